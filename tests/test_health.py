"""The health of an encoder: its measure against float64, its single warning, what it tells apart."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pixio.models.health import LEAST_VARIANCE, HealthWatch, token_health


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(4, 9, 16), (2, 3, 64)])  # more tokens than features, and fewer
def test_the_measure_equals_its_definition_in_float64(shape):
    tokens = 3 * draw(*shape) + draw(shape[-1])
    found, x = token_health(tokens), tokens.double().numpy()
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    flat = normed.reshape(-1, shape[-1])
    eigenvalues = np.linalg.eigvalsh(np.cov(flat.T, bias=True))
    assert found["mean_square"] == pytest.approx((x**2).mean(), rel=1e-5)
    assert found["variance"] == pytest.approx(flat.var(0).mean(), rel=1e-5)
    assert found["within_images"] == pytest.approx(normed.var(1).mean() / flat.var(0).mean(), rel=1e-5)
    assert found["rank"] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-4)


def test_variance_within_images_is_told_from_variance_between_them():
    same_in_an_image = draw(6, 1, 8).expand(-1, 5, -1)
    same_in_all_images = draw(1, 5, 8).expand(6, -1, -1)
    assert token_health(same_in_an_image)["within_images"] == pytest.approx(0, abs=1e-6)
    assert token_health(same_in_all_images)["within_images"] == pytest.approx(1, abs=1e-6)


def test_a_constant_direction_that_carries_everything_is_told_once(capsys):
    watch = HealthWatch("the student")
    watch.keep(draw(4, 9, 16))
    assert watch.measure()["variance"] > 0.8
    assert capsys.readouterr().err == ""
    watch.keep(draw(4, 9, 16) + 100 * F.one_hot(torch.tensor(3), 16))
    for _ in range(2):
        assert watch.measure()["variance"] < LEAST_VARIANCE
    (line,) = capsys.readouterr().err.splitlines()
    assert "the student hardly tells patches apart" in line
    assert "lower --lr or --blr" in line


def test_what_is_unhealthy_for_a_while_is_not_told_where_that_is_usual(capsys):
    watch = HealthWatch("the student", patience=3)
    healthy, unhealthy = draw(4, 9, 16), draw(4, 9, 16) + 100 * F.one_hot(torch.tensor(3), 16)
    for tokens in (unhealthy, unhealthy, healthy, unhealthy, unhealthy):
        watch.keep(tokens)
        watch.measure()
    assert capsys.readouterr().err == ""
    watch.measure()
    assert "the student hardly tells patches apart" in capsys.readouterr().err
