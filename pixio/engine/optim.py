"""AdamW with the parameter groups of masked-autoencoder training."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


def make_adamw(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.05,
    parts: Sequence[str] = (),
) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that require a gradient, fused where the device allows it.

    Biases and tensors with at most one dimension (norms) are not decayed; all others are, position embeddings
    and class and mask tokens among them. The order is the model's: a saved state fits any later process.

    Args:
        model: what to optimize.
        lr: learning rate.
        betas: decay rates of the two moments.
        weight_decay: of decayed parameters.
        parts: names of submodules that get groups of their own, so that `set_lr` can freeze them.

    Raises:
        ValueError: every parameter is frozen.
    """
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part in parts if name.startswith(f"{part}.")), "")
            exempt = parameter.ndim <= 1 or name.split(".")[-1] == "bias"
            groups.setdefault((part, 0.0 if exempt else weight_decay), []).append(parameter)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to optimize")
    described = [{"params": p, "part": part, "weight_decay": decay} for (part, decay), p in groups.items()]
    return fused_adamw(described, lr, betas, weight_decay)


def fused_adamw(
    parameters: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over parameters or groups of them; one kernel, which can skip a step, where the device has it."""
    options = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    parameters = list(parameters)
    try:
        return torch.optim.AdamW(parameters, **options, fused=True)
    except RuntimeError:  # this device has no fused kernel
        return torch.optim.AdamW(parameters, **options)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, frozen: str | None = None) -> None:
    """Set the learning rate of every group; 0 for those of the part `frozen`, whose bits stay the same.

    A group's `lr_scale`, if it has one, is a factor on its rate.
    """
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        group["lr"] = 0.0 if frozen is not None and group["part"] == frozen else rate
