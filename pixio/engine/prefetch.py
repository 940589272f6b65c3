"""The batches of a run on their way to the device: copied while the step before is computed."""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor

from pixio.engine.runtime import Runtime

Batch = dict[str, Tensor]
_REMEMBERED = 3  # steps: a step that is not finite is known one step later, when another has been read


class Source(Protocol):
    """A loader of batches without end, which knows where it stands; see `pixio.data.Loader`."""

    counts: dict[str, int]

    def __iter__(self) -> Generator[Batch, None, None]: ...
    def state_dict(self) -> Any: ...
    def report(self) -> dict[str, Any]: ...


class Prefetch:
    """The micro batches of one step after another, on the device; knows the state of `loader` before each.

    The batches of the next step are read, and copied beside the computation, when those of a step are taken.
    Copies from pinned memory wait for nothing.

    Args:
        loader: what gives the batches.
        runtime: the device.
        accum_iter: micro batches of a step.
        steps: numbers of the steps, from the first that is to be taken.

    Attributes:
        step: whose batches were taken last.
    """

    def __init__(self, loader: Source, runtime: Runtime, accum_iter: int, steps: Iterable[int]) -> None:
        self.loader, self.runtime, self.accum_iter = loader, runtime, accum_iter
        self._batches, self._steps = loader.__iter__(), iter(steps)
        self._before: dict[int, tuple[Any, dict[str, int]]] = {}  # state and counts, last steps only
        self._ahead = self._read()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._ahead is None:
            raise StopIteration
        take, self.step = self._ahead
        batches = take()
        self._ahead = self._read()
        return batches

    def close(self) -> None:
        """End what reads ahead; worker processes that are left to the interpreter's end would outlive it."""
        self._batches.close()

    def _read(self) -> tuple[Callable[[], list[Batch]], int] | None:
        """The batches of the next step on their way, and its number; None after the last."""
        step = next(self._steps, None)
        if step is None:
            return None
        self._before.setdefault(step, self._position())
        read = [next(self._batches) for _ in range(self.accum_iter)]
        self._before[step + 1] = self._position()
        self._before.pop(step - _REMEMBERED, None)
        return self.runtime.copy_ahead(read), step

    def _position(self) -> tuple[Any, dict[str, int]]:
        return self.loader.state_dict(), dict(self.loader.counts)

    @property
    def counts(self) -> dict[str, int]:
        """The loader's, of the batches that were taken."""
        return self._before[self.step + 1][1]

    def state_dict(self, step: int) -> Any:
        """The loader's before the batches of `step`, one of the last few steps or the next."""
        return self._before[step][0]

    def report(self) -> dict[str, Any]:
        """The loader's, with the counts of the batches that were taken."""
        return {**self.loader.report(), "counts": self.counts}
