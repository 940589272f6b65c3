"""One optimiser step: gradients accumulated over micro batches, checked on every rank, then applied."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pixio.engine.runtime import Runtime


class NonFiniteLoss(ArithmeticError):  # noqa: N818 (it names what was found)
    """The loss, or outside fp16 the gradient norm, was not finite on some rank; raised by all of them.

    Attributes:
        losses: mean loss of each rank's micro batches, in rank order.
        grad_norm: norm of the gradients averaged over ranks.
    """

    def __init__(self, losses: list[float], grad_norm: float) -> None:
        bad = [f"rank {rank}: {loss}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        found = f"the loss is not finite ({', '.join(bad)})" if bad else "the gradients are not finite"
        super().__init__(
            f"{found}; gradient norm {grad_norm}; the weights are those before this step. "
            "Look at the last images read, lower the learning rate, or compute in fp32"
        )
        self.losses = losses
        self.grad_norm = grad_norm


class StepResult(NamedTuple):
    """What one step measured, as scalars that stay on the device until somebody reads them."""

    loss: Tensor  # mean over micro batches and ranks
    grad_norm: Tensor  # Euclidean, before clipping; not finite when fp16 skips the step


def accumulate(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    clip_grad: float | None = None,
) -> StepResult:
    """Take one optimiser step with the mean gradient over `micro_batches` and ranks.

    The ranks exchange gradients with the last micro batch only. Before anything changes they agree that all
    is finite, which reads one flag from the device; nothing else waits for it (fp16's scaler reads one more).

    Args:
        model: what `runtime.wrap` returned.
        optimizer: its parameters are those clipped and measured.
        scaler: from `runtime.make_scaler`.
        micro_batches: equally large, or the mean is not that of their samples.
        loss_fn: `loss_fn(model, micro_batch)` is a scalar mean; it runs under autocast.
        clip_grad: largest gradient norm allowed; None leaves gradients alone.

    Raises:
        NonFiniteLoss: on every rank, when the loss or (outside fp16) the gradient norm of any is not finite.
        ValueError: there is no micro batch.
    """
    if not micro_batches:
        raise ValueError("a step needs at least one micro batch, found none")
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for index, micro_batch in enumerate(micro_batches):
        postpone = hasattr(model, "no_sync") and index + 1 < len(micro_batches)
        with model.no_sync() if postpone else contextlib.nullcontext():
            with runtime.autocast():
                loss = loss_fn(model, micro_batch) / len(micro_batches)
            scaler.scale(loss).backward()
        losses.append(loss.detach().float())
    local_loss = torch.stack(losses).sum()

    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
    finite = local_loss.isfinite()
    if not scaler.is_enabled():  # fp16 meets infinite gradients now and then: its scaler skips the step
        finite = finite & grad_norm.isfinite()
    loss, bad = runtime.mean(torch.stack([local_loss, (~finite).float()])).unbind()
    if bad.item() > 0:
        raise NonFiniteLoss(runtime.gather(local_loss.item()), grad_norm.item())

    if clip_grad is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad, grad_norm)
    scaler.step(optimizer)
    scaler.update()
    return StepResult(loss, grad_norm)
