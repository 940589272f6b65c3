"""One optimizer step: gradients accumulated over micro batches, checked on every rank, then applied.

`accumulate` does it for one model. Models that train side by side use its halves, `compute_gradients` for
each and one `apply_gradients` for all, so that either all of them take a step or none.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixio.engine import signals
from pixio.engine.runtime import Runtime


class NonFiniteLoss(ArithmeticError):  # noqa: N818 (the name says what is wrong)
    """The loss, or outside fp16 the gradient norm, was not finite on some rank; raised by all of them.

    Attributes:
        losses: mean loss of each rank's micro batches, in rank order.
        grad_norm: norm of the gradients averaged over ranks.
        model: which model it was, where several train side by side; else empty.
        step: steps taken before it, by the count of `Agreement`.
    """

    def __init__(self, losses: list[float], grad_norm: float, model: str = "", step: int = 0) -> None:
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
        self.step = step


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


class Agreement:
    """What the ranks agree on at each step, in the one all-reduce that its loss needs anyway.

    That is whether all is finite, whether a signal asks any of them to stop, and whether rank 0's clock says
    it is time to save. The host reads the answers to one step after it has queued the next, so that the
    device is never idle while its host waits. Until then the device itself skips a step that is not finite,
    and every step after it. All ranks read the same answers at the same point of the program.

    Args:
        runtime: the ranks.
        step: steps taken so far.
        late: whether it is time to save; rank 0's answer counts.

    Attributes:
        stop, late: the newest answers that were read.
    """

    def __init__(self, runtime: Runtime, step: int = 0, late: Callable[[], bool] = lambda: False) -> None:
        self.runtime, self.step = runtime, step
        self.stop = self.late = False
        self._is_late = late
        self._skip: Tensor | None = None  # 1 since a step was not finite, else 0
        self._posted: deque[_Posted] = deque()

    def post(self, gradients: Mapping[str, Gradients]) -> tuple[Tensor, Tensor]:
        """Collective: start the reduction over the ranks for this step; waits for nothing.

        Returns:
            The losses of all models, means over ranks; and 1 where the step must be skipped, else 0.
        """
        losses = torch.stack([found.loss for found in gradients.values()])  # [models]
        # in fp16 gradients overflow now and then: the scaler skips the step
        finite = [
            found.loss.isfinite() & (found.norm.isfinite() | found.scaler.is_enabled())
            for found in gradients.values()
        ]
        bad = (~torch.stack(finite)).float()  # [models]
        stop, late = signals.received(), self.runtime.is_main and self._is_late()
        packed = [losses, bad, bad.new_full((1,), float(stop)), bad.new_full((1,), float(late))]
        losses, bad, flags = self.runtime.mean(torch.cat(packed)).split([len(bad), len(bad), 2])
        skip = bad.amax().ceil()
        self._skip = skip if self._skip is None else torch.maximum(self._skip, skip)
        measured = {name: (found.loss, found.norm) for name, found in gradients.items()}
        self._posted.append(_Posted(self.step, measured, self.runtime.to_host(torch.cat([bad, flags]))))
        self.step += 1
        if self.runtime.world_size == 1:  # there is no other rank to hear from
            self.stop, self.late = stop, late
        return losses, self._skip

    def settle(self, older: int = 0) -> None:
        """Collective: read the answers to all steps but the newest `older`; now the weights are known good.

        Raises:
            NonFiniteLoss: on every rank, when the loss or (outside fp16) the gradient norm of any model on
                any rank was not finite; it names one such model.
        """
        while len(self._posted) > older:
            step, measured, read = self._posted.popleft()
            *bad, stop, late = (number > 0 for number in read())
            if any(bad):
                name, (loss, norm) = list(measured.items())[bad.index(True)]
                raise NonFiniteLoss(self.runtime.gather(loss.item()), norm.item(), name, step)
            if self.runtime.world_size > 1:
                self.stop, self.late = stop, late


class _Posted(NamedTuple):
    """A step whose answers are on their way to the host."""

    step: int
    measured: dict[str, tuple[Tensor, Tensor]]  # loss and gradient norm of each model, of this rank
    read: Callable[[], list]


def accumulate(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    clip_grad: float | None = None,
    agreement: Agreement | None = None,
) -> StepResult:
    """Take one optimizer step with the mean gradient over `micro_batches` and ranks.

    Args: those of `compute_gradients` and `apply_gradients`.

    Raises:
        NonFiniteLoss, ValueError: see there.
    """
    gradients = compute_gradients(runtime, model, optimizer, scaler, micro_batches, loss_fn)
    return apply_gradients(runtime, {"": gradients}, clip_grad, agreement)[""]


def compute_gradients(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
) -> Gradients:
    """Leave the mean gradient over `micro_batches` and ranks in the parameters; nothing else changes.

    Ranks with copies, and nodes with copies of shards, exchange gradients with the last micro batch only; the
    ranks that share one copy, which have no room for whole gradients, with each. Nothing waits.

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
        last = index + 1 == len(micro_batches)
        postpone = hasattr(model, "no_sync") and not last
        if hasattr(model, "set_requires_all_reduce"):  # between nodes; FSDP sums the shards within each first
            model.set_requires_all_reduce(last)
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
    runtime: Runtime,
    gradients: Mapping[str, Gradients],
    clip_grad: float | None = None,
    agreement: Agreement | None = None,
) -> dict[str, StepResult]:
    """Take the optimizer step of every model, or, where any loss or gradient is not finite, of none.

    Args:
        gradients: of each model, by its name in errors.
        clip_grad: largest gradient norm allowed, of each model; None leaves gradients alone.
        agreement: of the run: a step that is not finite is skipped by the device, and raised one step later,
            or by `Agreement.settle`. None, or with an optimizer that cannot skip a step, or in fp16: the host
            waits for the device before anything changes.

    Raises:
        NonFiniteLoss: on every rank; see `Agreement.settle`.
    """
    can_skip = all(
        getattr(found.optimizer, "_step_supports_amp_scaling", False) and not found.scaler.is_enabled()
        for found in gradients.values()
    )  # fused optimizers: they know from GradScaler what to do with `found_inf`
    wait = agreement is None or not can_skip
    agreement = agreement or Agreement(runtime)
    losses, skip = agreement.post(gradients)
    if wait:
        agreement.settle()

    results = {}
    for (name, found), loss in zip(gradients.items(), losses, strict=True):
        if clip_grad is not None:
            nn.utils.clip_grads_with_norm_(found.parameters, clip_grad, found.norm)
        if not wait:
            found.optimizer.grad_scale, found.optimizer.found_inf = None, skip
        found.scaler.step(found.optimizer)
        found.scaler.update()
        results[name] = StepResult(loss, found.norm)
    agreement.settle(older=1)
    return results
