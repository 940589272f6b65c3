"""One optimizer step: gradients accumulated over micro batches, checked on every rank, then applied.

`accumulate` does it for one model. Models that train side by side use its halves, `compute_gradients` for
each and one `apply_gradients` for all, so that either all of them take a step or none.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixio.engine.runtime import Runtime


class NonFiniteLoss(ArithmeticError):  # noqa: N818 (the name says what is wrong)
    """The loss, or outside fp16 the gradient norm, was not finite on some rank; raised by all of them.

    Attributes:
        losses: mean loss of each rank's micro batches, in rank order.
        grad_norm: norm of the gradients averaged over ranks.
        model: which model it was, where several train side by side; else empty.
    """

    def __init__(self, losses: list[float], grad_norm: float, model: str = "") -> None:
        bad = [f"rank {rank}: {loss}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        whose = f" of {model}" if model else ""
        found = (
            f"the loss{whose} is not finite ({', '.join(bad)})"
            if bad
            else f"the gradients{whose} are not finite"
        )
        super().__init__(
            f"{found}; gradient norm {grad_norm}; the weights are those before this step. "
            "Look at the last images read, lower the learning rate, or compute in fp32"
        )
        self.losses = losses
        self.grad_norm = grad_norm
        self.model = model


class StepResult(NamedTuple):
    """What one step measured, as scalars that stay on the device until they are read."""

    loss: Tensor  # mean over micro batches and ranks
    grad_norm: Tensor  # Euclidean, before clipping; not finite when fp16 skips the step


class Gradients(NamedTuple):
    """What `compute_gradients` left in a model's parameters, not yet agreed upon and applied."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    parameters: list[nn.Parameter]
    loss: Tensor  # of this rank, mean over micro batches
    norm: Tensor  # Euclidean, before clipping


def accumulate(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    clip_grad: float | None = None,
) -> StepResult:
    """Take one optimizer step with the mean gradient over `micro_batches` and ranks.

    Args: those of `compute_gradients` and `apply_gradients`.

    Raises:
        NonFiniteLoss, ValueError: see there.
    """
    gradients = compute_gradients(runtime, model, optimizer, scaler, micro_batches, loss_fn)
    return apply_gradients(runtime, {"": gradients}, clip_grad)[""]


def compute_gradients(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
) -> Gradients:
    """Leave the mean gradient over `micro_batches` and ranks in the parameters; nothing else changes.

    Ranks with copies exchange gradients with the last micro batch only; those with shards, which have no room
    for whole gradients, with each. Nothing waits for the device.

    Args:
        model: what `runtime.wrap` returned.
        optimizer: over the parameters whose gradients are measured, and later clipped and applied.
        scaler: from `runtime.make_scaler`, one for each optimizer.
        micro_batches: of equal size, else the mean is not that over their samples.
        loss_fn: `loss_fn(model, micro_batch)` is a scalar mean; it runs under autocast.

    Raises:
        ValueError: there is no micro batch.
    """
    if not micro_batches:
        raise ValueError("a step needs at least one micro batch, found none")
    optimizer.zero_grad(set_to_none=True)
    losses = []
    runtime.heartbeat()
    for index, micro_batch in enumerate(micro_batches):
        postpone = hasattr(model, "no_sync") and index + 1 < len(micro_batches)
        with model.no_sync() if postpone else contextlib.nullcontext():
            with runtime.autocast():
                loss = loss_fn(model, micro_batch) / len(micro_batches)
            runtime.heartbeat()
            scaler.scale(loss).backward()
        losses.append(loss.detach().float())

    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if isinstance(norm, DTensor):  # of shards
        norm = norm.full_tensor()
    return Gradients(optimizer, scaler, parameters, torch.stack(losses).sum(), norm)


def apply_gradients(
    runtime: Runtime, gradients: Mapping[str, Gradients], clip_grad: float | None = None
) -> dict[str, StepResult]:
    """Take the optimizer step of every model, or, where any loss or gradient is not finite, of none.

    Before anything changes the ranks agree that all is finite, which reads one number from the device;
    nothing else waits for it (fp16's scalers read one more each).

    Args:
        gradients: of each model, by its name in errors.
        clip_grad: largest gradient norm allowed, of each model; None leaves gradients alone.

    Raises:
        NonFiniteLoss: on every rank, when the loss or (outside fp16) the gradient norm of any model on any
            rank is not finite; it names one such model.
    """
    losses = torch.stack([found.loss for found in gradients.values()])  # [models]
    # in fp16 gradients overflow now and then: the scaler skips the step
    finite = [
        found.loss.isfinite() & (found.norm.isfinite() | found.scaler.is_enabled())
        for found in gradients.values()
    ]
    losses, bad = runtime.mean(torch.stack([losses, (~torch.stack(finite)).float()]))  # 2 x [models]
    if bad.any().item():
        name, found = list(gradients.items())[int(bad.argmax())]
        raise NonFiniteLoss(runtime.gather(found.loss.item()), found.norm.item(), name)

    results = {}
    for (name, found), loss in zip(gradients.items(), losses, strict=True):
        if clip_grad is not None:
            nn.utils.clip_grads_with_norm_(found.parameters, clip_grad, found.norm)
        found.scaler.step(found.optimizer)
        found.scaler.update()
        results[name] = StepResult(loss, found.norm)
    return results
