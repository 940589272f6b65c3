"""One optimizer step, the optimizer and the schedule, in one process."""

import dataclasses
import itertools
import math

import pytest
import torch
from helpers import ALONE, equal, squares, step_images, tiny_model, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pixio.engine.optim import make_adamw, set_lr
from pixio.engine.schedule import poly, warmup_cosine
from pixio.engine.step import Agreement, NonFiniteLoss, accumulate


def test_infinite_gradients_of_a_finite_loss_are_refused():
    model = tiny_model()
    optimizer = make_adamw(model, 1e-2)
    before = weights(model)
    with pytest.raises(NonFiniteLoss, match="gradients are not finite"):
        accumulate(
            ALONE,
            model,
            optimizer,
            ALONE.make_scaler(),
            [torch.ones(2, 6)],
            lambda m, x: (m(x) * 0).sum().sqrt(),
        )
    assert equal(before, weights(model))


def test_fp16_skips_a_step_with_infinite_gradients_and_lowers_its_scale():
    runtime = dataclasses.replace(ALONE, dtype=torch.float16)
    model, scaler = tiny_model(), runtime.make_scaler()
    optimizer = make_adamw(model, 1e-2)
    before = weights(model)
    # A scale of 2**16 times this slope leaves even the range of float32.
    result = accumulate(
        runtime, model, optimizer, scaler, [torch.ones(2, 6)], lambda m, x: 1e36 * m(x).float().mean()
    )
    assert result.loss.isfinite()
    assert not result.grad_norm.isfinite()
    assert equal(before, weights(model))
    assert scaler.get_scale() == 2.0**15


def test_the_scaler_is_transparent_outside_fp16():
    assert not ALONE.make_scaler().is_enabled()
    assert not dataclasses.replace(ALONE, dtype=torch.bfloat16).make_scaler().is_enabled()


def test_clipping_limits_the_gradient_and_reports_its_norm_before():
    results = {}
    for clip in (None, 0.01):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = weights(model)
        result = accumulate(
            ALONE, model, optimizer, ALONE.make_scaler(), [step_images(0)], squares, clip_grad=clip
        )
        moved = torch.cat([(a - b).flatten() for a, b in zip(before, weights(model), strict=True)]).norm()
        results[clip] = (result.grad_norm.item(), moved.item())
    assert results[None][0] == pytest.approx(results[None][1], rel=1e-5)
    assert results[0.01] == pytest.approx((results[None][0], 0.01), rel=1e-3)


def test_a_step_without_micro_batches_is_an_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="at least one micro batch"):
        accumulate(ALONE, model, make_adamw(model, 1.0), ALONE.make_scaler(), [], squares)


def test_random_numbers_are_a_function_of_seed_and_step():
    draws = []
    for seed, step in ((0, 5), (0, 6), (1, 5), (0, 5)):
        ALONE.seed(seed, step)
        draws.append(torch.rand(8).tolist())
    assert draws[0] == draws[3]
    assert draws[0] != draws[1]
    assert draws[0] != draws[2]


def test_only_biases_and_vectors_escape_weight_decay():
    model = tiny_model()
    model.register_parameter("mask_token", nn.Parameter(torch.zeros(1, 1, 8)))
    model.register_parameter("frozen", nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    model.add_module("odd", nn.ParameterDict({"bias": nn.Parameter(torch.zeros(2, 2))}))
    optimizer = make_adamw(model, 1e-3, weight_decay=0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decays == {
        "mask_token": 0.3,
        "0.weight": 0.3,
        "3.weight": 0.3,
        "0.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
        "3.bias": 0.0,
        "odd.bias": 0.0,
    }


def test_a_shared_parameter_is_optimized_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = make_adamw(model, 1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_a_wholly_frozen_model_cannot_be_optimized():
    with pytest.raises(ValueError, match="nothing to optimize"):
        make_adamw(tiny_model().requires_grad_(False), 1e-3)


def test_set_lr_reaches_every_group():
    optimizer = make_adamw(tiny_model(), 1e-3)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 2.0),
        (4, 8.0),
        (5, 7.0 * 0.5 * (1 + math.sqrt(0.5)) + 1.0),
        (6, 4.5),
        (8, 1.0),
        (99, 1.0),
    ],
)
def test_warmup_cosine_matches_values_worked_out_by_hand(step, expected):
    assert warmup_cosine(step, 8.0, 1.0, 4, 8) == pytest.approx(expected)


@given(st.integers(0, 1000), st.integers(1, 1000), st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
def test_warmup_cosine_rises_to_the_peak_without_a_jump_and_falls_to_the_end(warmup, rest, peak, share):
    end, total = peak * share, warmup + rest
    rates = [warmup_cosine(step, peak, end, warmup, total) for step in range(total + 1)]
    assert rates[warmup] == pytest.approx(peak)
    assert rates[-1] == end
    assert all(0.0 <= rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    largest_step = max(peak / max(warmup, 1), (peak - end) * math.pi / 2 / rest)
    assert all(abs(a - b) <= largest_step * (1 + 1e-6) for a, b in itertools.pairwise(rates))


def test_a_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match="warm-up of 9 steps does not fit a run of 8"):
        warmup_cosine(0, 1.0, 0.0, 9, 8)


def test_poly_rises_linearly_then_falls_with_the_power_of_what_is_left():
    rates = [poly(step, 2.0, 10, 110) for step in range(111)]
    assert rates[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert rates[10:] == pytest.approx([2.0 * (1 - step / 100) ** 0.9 for step in range(101)])


def test_poly_without_warmup_is_the_textbook_schedule():
    schedule = torch.optim.lr_scheduler.PolynomialLR
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = schedule(optimizer, total_iters=20, power=0.9)
    for step in range(21):
        assert poly(step, 0.3, 0, 20) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_poly_stays_at_zero_after_the_end_and_refuses_a_warmup_longer_than_the_run():
    assert poly(25, 0.3, 0, 20) == 0
    with pytest.raises(ValueError, match="warm-up of 21 steps"):
        poly(0, 0.3, 21, 20)


def late_steps(optimizer_of, poisoned: int, dtype=torch.float32) -> tuple[nn.Module, list[bool], int]:
    """Steps of an agreement; which of them moved the weights, and the step that was raised."""
    runtime = dataclasses.replace(ALONE, dtype=dtype)
    model, scaler = tiny_model(), runtime.make_scaler()
    optimizer, agreement, moved = optimizer_of(model), Agreement(runtime), []
    for step in range(9):
        before = weights(model)
        images = step_images(step) * (math.nan if step == poisoned else 1)
        try:
            accumulate(runtime, model, optimizer, scaler, [images], squares, None, agreement)
        except NonFiniteLoss as error:
            return model, [*moved, not equal(before, weights(model))], error.step
        moved.append(not equal(before, weights(model)))
    raise AssertionError("nothing was raised")


def test_a_bad_step_is_skipped_where_it_runs_and_raised_when_the_next_has_run():
    model, moved, step = late_steps(lambda model: make_adamw(model, 1e-2), poisoned=3)
    assert moved == [True] * 3 + [False] * 2
    assert step == 3
    good = tiny_model()
    optimizer = make_adamw(good, 1e-2)
    for step in range(3):
        accumulate(ALONE, good, optimizer, ALONE.make_scaler(), [step_images(step)], squares)
    assert equal(weights(model), weights(good))


def test_an_optimizer_that_cannot_skip_and_fp16_raise_before_anything_changes():
    _, moved, step = late_steps(lambda model: torch.optim.SGD(model.parameters(), 0.1), poisoned=2)
    assert (moved, step) == ([True, True, False], 2)
    _, moved, step = late_steps(lambda model: make_adamw(model, 1e-2), poisoned=2, dtype=torch.float16)
    assert (moved[-1], step) == (False, 2)


def test_settling_raises_at_once():
    model, agreement = tiny_model(), Agreement(ALONE, step=7)
    step = (ALONE, model, make_adamw(model, 1e-2), ALONE.make_scaler())
    accumulate(*step, [step_images(0) * math.inf], squares, None, agreement)
    with pytest.raises(NonFiniteLoss, match="not finite") as caught:
        agreement.settle()
    assert caught.value.step == 7
