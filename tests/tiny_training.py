"""A model small enough to train in a test, the batches of its steps, and a disk that is full."""

from types import SimpleNamespace

import torch
from torch import nn

from pixio.engine.runtime import Runtime

ALONE = Runtime(torch.device("cpu"))


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def step_images(step: int) -> torch.Tensor:
    """All 8 samples of a step, whatever the number of ranks and micro batches that share them."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def zero(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


def full_disk(folder) -> SimpleNamespace:
    return SimpleNamespace(free=3)
