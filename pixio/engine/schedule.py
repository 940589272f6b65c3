"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

import math


def warmup_cosine(step: int, base_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step (the first is 0): linear from 0 to `base_lr`, then half a cosine to `min_lr`.

    Args:
        step: optimizer steps taken so far; from `total_steps` on the rate stays at `min_lr`.
        base_lr: the peak, reached at `warmup_steps`.
        min_lr: the end, reached at `total_steps`.
        warmup_steps: 0 starts at the peak.
        total_steps: steps of the whole run, warm-up included.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    if (lr := _warmup(step, base_lr, warmup_steps, total_steps)) is not None:
        return lr
    if step >= total_steps:
        return min_lr
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (base_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def poly(step: int, base_lr: float, warmup_steps: int, total_steps: int, power: float = 0.9) -> float:
    """Learning rate of a step (the first is 0): linear from 0 to `base_lr`, then a polynomial down to 0.

    Args:
        step: optimizer steps taken so far; from `total_steps` on the rate is 0.
        base_lr: the peak, reached at `warmup_steps`.
        warmup_steps: 0 starts at the peak.
        total_steps: steps of the whole run, warm-up included.
        power: exponent of the remaining share of the descent.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    if (lr := _warmup(step, base_lr, warmup_steps, total_steps)) is not None:
        return lr
    if step >= total_steps:
        return 0.0
    return base_lr * ((total_steps - step) / (total_steps - warmup_steps)) ** power


def _warmup(step: int, base_lr: float, warmup_steps: int, total_steps: int) -> float | None:
    """The linear rise from 0; None once it is over."""
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warm-up of {warmup_steps} steps does not fit a run of {total_steps}: shorten it")
    return base_lr * step / warmup_steps if step < warmup_steps else None
