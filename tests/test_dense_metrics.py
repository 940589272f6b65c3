"""Losses and metrics of dense evaluation, against formulas in float64 and other libraries."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monodepth.metrics import METRICS, DepthScores, silog_loss
from semseg.metrics import SegmentationScores, segmentation_loss

# --- depth: loss and metrics --------------------------------------------------------------------------------


def test_silog_loss_equals_its_formula_in_float64():
    rng = np.random.default_rng(0)
    prediction, target = rng.uniform(0.2, 9, (2, 3, 4, 5))
    target[0, :2] = 0
    target[1, 0] = 50  # beyond the farthest depth
    prediction[2, 0, 0] = 0  # raised to the nearest depth
    differences = []
    for p, t in zip(prediction.ravel(), target.ravel(), strict=True):
        if 0.1 <= t <= 10:
            differences.append(math.log(t) - math.log(max(p, 0.1)))
    mean_square = sum(d * d for d in differences) / len(differences)
    mean = sum(differences) / len(differences)
    tensors = (torch.tensor(x, dtype=torch.float32) for x in (prediction, target))
    loss = silog_loss(*tensors, 0.1, 10)
    assert loss.item() == pytest.approx(math.sqrt(mean_square - 0.5 * mean * mean), rel=1e-5)


@pytest.mark.parametrize("target", [torch.zeros(1, 4, 4), torch.full((1, 4, 4), 2.0)])
def test_silog_loss_has_a_finite_gradient_without_measured_pixels_and_without_error(target):
    prediction = torch.full((1, 4, 4), 2.0, requires_grad=True)
    loss = silog_loss(prediction, target, 0.1, 10)
    loss.backward()
    assert loss.item() < 1e-5
    assert prediction.grad.abs().max() == 0


def nine_metrics(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The published metrics of one image in float64, pixel by pixel."""
    pairs = [(float(p), float(t)) for p, t in zip(prediction.ravel(), target.ravel(), strict=True)]
    pairs = [(min(max(p, 0.5), 8.0), t) for p, t in pairs if 0.5 <= t <= 8.0]
    logs = [math.log(p / t) for p, t in pairs]
    n = len(pairs)
    within = {f"d{k}": 100 * sum(max(p / t, t / p) < 1.25**k for p, t in pairs) / n for k in (1, 2, 3)}
    return within | {
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
        "sq_rel": sum((p - t) ** 2 / t for p, t in pairs) / n,
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n),
        "rmse_log": math.sqrt(sum(x * x for x in logs) / n),
        "log10": sum(abs(x) / math.log(10) for x in logs) / n,
        "silog": math.sqrt(sum(x * x for x in logs) / n - 0.5 * (sum(logs) / n) ** 2),
    }


def depth_images(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [(rng.uniform(0, 9, (6, 7)), rng.uniform(0, 9, (6, 7))) for _ in range(count)]


def depth_scores(images, indices) -> DepthScores:
    scores = DepthScores(0.5, 8.0)
    for index in indices:
        prediction, target = (torch.tensor(x) for x in images[index])
        scores.add(index, prediction, target)
    return scores


def test_depth_metrics_are_means_over_images_of_their_float64_values():
    images = depth_images(4)
    found = DepthScores.summarize([depth_scores(images, range(4)).state])
    rows = [nine_metrics(*image) for image in images]
    expected = {name: sum(row[name] for row in rows) / 4 for name in METRICS}
    assert {name: found[name] for name in METRICS} == pytest.approx(expected, rel=1e-9)
    assert (found["images"], found["skipped"]) == (4, 0)


def test_errors_of_depth_equal_torchmetrics():
    from torchmetrics.functional import (
        mean_absolute_percentage_error,
        mean_squared_error,
        mean_squared_log_error,
    )

    ((prediction, target),) = depth_images(1)
    found = DepthScores.summarize([depth_scores([(prediction, target)], [0]).state])
    valid = (target >= 0.5) & (target <= 8)
    p, t = (torch.tensor(x[valid]) for x in (prediction.clip(0.5, 8), target))
    assert found["rmse"] == pytest.approx(mean_squared_error(p, t, squared=False).item(), rel=1e-9)
    assert found["abs_rel"] == pytest.approx(mean_absolute_percentage_error(p, t).item(), rel=1e-9)
    logs = mean_squared_log_error(p - 1, t - 1).sqrt().item()  # whose logarithms are of 1 + x
    assert found["rmse_log"] == pytest.approx(logs, rel=1e-9)


def test_depth_metrics_do_not_depend_on_the_number_of_ranks():
    images = depth_images(5)
    alone = depth_scores(images, range(5))
    two = [depth_scores(images, range(rank, 5, 2)).state for rank in (0, 1)]
    assert DepthScores.summarize([alone.state]) == DepthScores.summarize(two)


def test_images_with_fewer_than_ten_measured_pixels_are_skipped():
    (prediction, target), full = depth_images(2)
    for pixels, skipped in ((9, 1), (10, 0)):
        sparse = np.zeros_like(target)
        sparse.ravel()[:pixels] = 2.0
        found = DepthScores.summarize([depth_scores([(prediction, sparse), full], (0, 1)).state])
        assert (found["images"], found["skipped"]) == (2 - skipped, skipped)


def test_depth_without_any_measured_pixel_is_an_error():
    with pytest.raises(ValueError, match="none of the 1 images"):
        DepthScores.summarize([depth_scores([(np.ones((6, 7)), np.zeros((6, 7)))], [0]).state])


# --- segmentation: loss and metric --------------------------------------------------------------------------


def test_segmentation_loss_is_the_mean_over_the_scored_pixels():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 5, 6, 7), torch.randint(0, 5, (2, 6, 7), dtype=torch.uint8)
    mask[0, :3] = 255
    expected = F.cross_entropy(logits.double(), mask.long(), ignore_index=255)
    assert segmentation_loss(logits, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert segmentation_loss(logits, torch.full_like(mask, 255)).item() == 0


def predictions_and_masks(nclass: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images = []
    for side in (5, 8, 13):
        mask = torch.randint(0, nclass - 1, (side, side), generator=generator, dtype=torch.uint8)
        mask[torch.rand(side, side, generator=generator) < 0.2] = 255
        images.append((torch.randint(0, nclass, (side, side), generator=generator), mask))
    return images


def test_miou_equals_scikit_learns():
    from sklearn.metrics import jaccard_score

    nclass = 6
    scores = SegmentationScores(nclass)
    truth, predicted = [], []
    for index, (prediction, mask) in enumerate(predictions_and_masks(nclass)):
        scores.add(index, prediction, mask)
        truth += mask[mask != 255].tolist()
        predicted += prediction[mask != 255].tolist()
    found = scores.summarize([scores.state])
    expected = jaccard_score(truth, predicted, labels=range(nclass), average=None)
    assert found["iou"] == pytest.approx((100 * expected).tolist(), rel=1e-12)
    assert found["miou"] == pytest.approx(100 * expected.mean(), rel=1e-12)
    assert found["images"] == 3


def test_miou_equals_torchmetrics():
    from torchmetrics.functional.classification import multiclass_jaccard_index

    scores, images = SegmentationScores(6), predictions_and_masks(6)
    for index, image in enumerate(images):
        scores.add(index, *image)
    predicted, truth = (torch.cat([image[i].flatten() for image in images]) for i in (0, 1))
    expected = multiclass_jaccard_index(predicted, truth.long(), 6, average="none", ignore_index=255)
    assert scores.summarize([scores.state])["iou"] == pytest.approx((100 * expected).tolist(), rel=1e-6)


def test_miou_does_not_depend_on_the_number_of_ranks():
    images = predictions_and_masks(4)

    def state(indices):
        scores = SegmentationScores(4)
        for index in indices:
            scores.add(index, *images[index])
        return scores.state

    assert SegmentationScores.summarize([state((0, 1, 2))]) == SegmentationScores.summarize(
        [state((0, 2)), state((1,))]
    )


def test_a_class_that_never_occurs_has_no_share_in_the_mean():
    scores = SegmentationScores(3)
    mask = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)
    scores.add(0, torch.tensor([[0, 1], [0, 1]]), mask)
    found = scores.summarize([scores.state])
    assert found["iou"] == pytest.approx([50.0, 200 / 3, None])
    assert found["miou"] == pytest.approx((50 + 200 / 3) / 2)


def test_masks_without_any_scored_pixel_are_an_error():
    scores = SegmentationScores(3)
    scores.add(0, torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match="nothing to score"):
        scores.summarize([scores.state])
