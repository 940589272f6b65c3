"""Copies in host memory of tensors that training goes on to change."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


class HostCopies:
    """Host memory that tensors are copied into and that the next copy uses again.

    From a GPU the copying runs on a stream of its own, into pinned memory, beside the work that the program
    goes on to give it. Weights and moments change in optimizer steps alone, so it is those that wait for it.

    Args:
        device: where the tensors are.
        pinned: copy into pinned memory, without waiting; see `Runtime.pins_memory`.
    """

    def __init__(self, device: torch.device, pinned: bool = False) -> None:
        self._pinned = pinned
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.Event | None = None
        if pinned:
            self._stream = torch.Stream(device)
            register_optimizer_step_pre_hook(self._before_update)

    def copy(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], object]]:
        """Copy `tensors`, each by its name, over what was copied before.

        Returns:
            The copies, and a function that waits until they are complete. Before that only optimizer steps
            may change tensors on a GPU.
        """
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
            copies[name] = buffer
        self._buffers = copies
        if self._pinned:
            self._stream.wait_stream(torch.accelerator.current_stream(self._stream.device))
        with self._stream if self._pinned else nullcontext():
            for name, tensor in tensors.items():
                copies[name].copy_(tensor.detach(), non_blocking=self._pinned)
                if self._pinned and tensor.device == self._stream.device:
                    tensor.record_stream(self._stream)  # the tensor may be a temporary one
        if not self._pinned:
            return copies, lambda: None
        self._copied = self._stream.record_event()
        return copies, self._copied.synchronize

    def _before_update(self, *_) -> None:
        if self._copied is not None:
            torch.accelerator.current_stream(self._stream.device).wait_event(self._copied)
