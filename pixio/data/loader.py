"""Batches of a stream from worker processes, exactly resumable.

Every batch carries the position after it. What workers have prefetched but the training loop has not taken
is therefore read again when a run is resumed, never lost.

Guarantees, for as long as the data set and the seed stay the same:
* each image is visited by exactly one (rank, worker) in each epoch;
* resumed with as many ranks and workers, the samples are those of the uninterrupted run, batch by batch;
* resumed with others, the epochs in progress are completed: what had been visited is not visited again in
  the same epoch, what had not been is, each image once. Only the order differs from the uninterrupted run.
"""

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pixio.data.read_statistics import DataError
from pixio.data.sampling import Position, ResumedFrom, Sampler
from pixio.data.stream import Stream, StreamReader
from pixio.data.worker_status import WorkerStatus, what_dead_workers_read, worker_deaths_raised_by_next

MAX_ERRORS = 10_000  # different messages that a loader remembers
SHARED_MEMORY, MIB = "/dev/shm", 2**20


@dataclass(frozen=True)
class _RankBatches(IterableDataset):
    """A rank's share of a stream; worker process w of the loader plays the w-th of the consumers."""

    stream: Stream
    sampler: Sampler
    consumers: list[tuple[int, Position, WorkerStatus]]  # number in the sampler, start, what it reads
    shared_memory: bool  # batches travel in it, else through pipes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        consumer, start, status = self.consumers[info.id if info else 0]
        status.start()
        try:
            for batch in StreamReader(self.stream, self.sampler, consumer, status).batches(start):
                if info:
                    batch["images"] = _to_send(batch["images"], self.shared_memory)
                yield {**batch, "consumer": consumer}
        except DataError as error:
            # raised by the loader, without the traceback of a process the reader does not know
            yield {"failure": str(error)}


def _to_send(images: Tensor, shared_memory: bool) -> Tensor | np.ndarray:
    """A batch on its way to the main process: a tensor in shared memory, or an array [B, S, S, 3]."""
    if shared_memory:
        with suppress(RuntimeError):  # it has become full
            return images.share_memory_()
    return images.permute(0, 2, 3, 1).numpy()


def _identity(batch: dict[str, Any]) -> dict[str, Any]:
    """Collate nothing: `DataLoader` would turn arrays into tensors."""
    return batch


class Loader:
    """The batches of one rank, without end, from worker processes; knows where it stands.

    Iterating again continues where the last iteration stopped.

    Args:
        stream: what to read.
        rank, world_size: of this process.
        num_workers: worker processes; 0 reads in this one.
        pin_memory: give batches in pinned memory, for non-blocking transfer to an accelerator.
        prefetch: batches each worker keeps ready.
        state: to resume: the `state_dict()`s of ALL ranks of the interrupted run, in any order, whatever
            their number. Gather them over the ranks when saving a checkpoint, and save the list.
        new_epoch_if_changed: when `state` belongs to another data set or seed, say so and begin a new epoch.

    Attributes:
        counts: images seen, kept and dropped, by reason, since this loader was made.

    Raises:
        ValueError: the state is incomplete, or belongs to another data set or seed.
        DataError: while iterating: the data cannot be read, or a worker process died.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 4,
        state: list[dict[str, Any]] | None = None,
        new_epoch_if_changed: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to world_size - 1, found rank {rank} of {world_size}")
        self.stream = stream
        self.rank, self.world_size = rank, world_size
        self.num_workers, self.pin_memory, self.prefetch = num_workers, pin_memory, prefetch
        self.counts: Counter[str] = Counter()
        self._errors: dict[str, None] = {}  # in the order in which they occurred

        self._readers = max(num_workers, 1)
        self._turn = 0  # reader that gives the next batch
        self._positions: list[Position] = [(0, 0, 0)] * self._readers
        consumers = world_size * self._readers
        self._sampler = Sampler(len(stream.shards), consumers, stream.seed, stream.shuffle_shards)
        if state:
            self._resume(state, new_epoch_if_changed)

    def __iter__(self) -> Generator[dict[str, Tensor], None, None]:
        # DataLoader always begins with its worker 0, so that one plays the reader whose turn it is
        readers = [(self._turn + worker) % self._readers for worker in range(self._readers)]
        first = self.rank * self._readers
        statuses = [WorkerStatus() for _ in readers]
        consumers = [
            (first + reader, self._positions[reader], status)
            for reader, status in zip(readers, statuses, strict=True)
        ]
        loader = DataLoader(
            _RankBatches(self.stream, self._sampler, consumers, self._fits_shared_memory()),
            batch_size=None,
            collate_fn=_identity,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prefetch if self.num_workers else None,
            generator=torch.Generator(),  # else it would draw from, and so shift, the global one
        )
        with worker_deaths_raised_by_next():
            batches = iter(loader)
        while True:
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                dead = " and ".join(what_dead_workers_read(statuses))
                if not dead:
                    raise
                raise DataError(
                    f"a worker process died while it read {dead}: out of memory, /dev/shm too small for "
                    "the batches of all workers (fewer workers need less), or a fault in a decoder"
                ) from error
            if "failure" in batch:
                raise DataError(batch["failure"])
            reader = batch["consumer"] - first
            self._positions[reader] = tuple(batch["position"])
            self._turn = (reader + 1) % self._readers
            self.counts.update(batch["counts"])
            if len(self._errors) < MAX_ERRORS:
                self._errors.update(dict.fromkeys(batch["errors"]))
            images = batch["images"]
            if isinstance(images, np.ndarray):
                images = torch.from_numpy(images).permute(0, 3, 1, 2)
                images = images.pin_memory() if self.pin_memory else images
            yield {"images": images}

    def _fits_shared_memory(self) -> bool:
        """Whether /dev/shm has room for the batches of all workers; warns if not. A container has 64 MB."""
        if not self.num_workers or not os.path.isdir(SHARED_MEMORY):
            return True
        batch = self.stream.batch_size * 3 * self.stream.size**2  # bytes
        needed = batch * (self.num_workers * (self.prefetch + 1) + 2)
        free = shutil.disk_usage(SHARED_MEMORY).free
        if needed > free:
            warnings.warn(
                f"{SHARED_MEMORY} has {free / MIB:,.0f} MiB free, the batches of {self.num_workers} workers "
                f"need {needed / MIB:,.0f} MiB: they are sent through pipes, which is slower. Enlarge it "
                "(docker run --shm-size=16g), or use fewer workers or smaller batches",
                stacklevel=3,
            )
        return needed <= free

    @property
    def errors(self) -> list[str]:
        """One message for each image or shard that could not be read, up to MAX_ERRORS; none twice."""
        return list(self._errors)

    def report(self) -> dict[str, Any]:
        """What this rank has read since the loader was made, `counts` and `errors`, as plain values."""
        return {"counts": dict(self.counts), "errors": self.errors}

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands after the last batch taken, in plain values; rank 0 adds what all share."""
        return {
            "stream": self.stream.identity(),
            "rank": self.rank,
            "world_size": self.world_size,
            "turn": self._turn,
            "positions": [list(position) for position in self._positions],
            "past": self._sampler.resumed_state() if self.rank == 0 else None,
        }

    def _resume(self, states: list[dict[str, Any]], new_epoch_if_changed: bool) -> None:
        """Continue at the positions of an interrupted run; of other consumers, read what they left."""
        states = sorted(states, key=lambda state: state["rank"])
        ranks, world_size = [state["rank"] for state in states], states[0]["world_size"]
        if ranks != list(range(world_size)):
            raise ValueError(
                f"the loader's state must hold one entry for each of the {world_size} ranks that saved it, "
                f"found ranks {ranks}; gather state_dict() over all ranks before saving"
            )
        self.stream = self.stream.named_as_in(states[0]["stream"])
        current = self.stream.identity()
        for saved in (state["stream"] for state in states):
            changed = ", ".join(
                f"{key} {saved[key]} -> {value}" for key, value in current.items() if saved[key] != value
            )
            if changed and new_epoch_if_changed:
                if self.rank == 0:
                    print(f"The data is not the checkpoint's ({changed}): a new epoch begins", flush=True)
                return
            if changed:
                raise ValueError(
                    f"the saved position belongs to other data ({changed}); restore these settings, or "
                    "begin a new epoch (--new_data of the training programs)"
                )

        positions = [tuple(position) for state in states for position in state["positions"]]
        first = min(epoch for epoch, _, _ in positions)
        interrupted = replace(self._sampler, consumers=len(positions)).resume(states[0]["past"])
        if interrupted.resumed_from and first > interrupted.resumed_from.last_epoch:
            interrupted = replace(interrupted, resumed_from=None)
        readers = len(states[0]["positions"])
        if (world_size, readers) == (self.world_size, self._readers):
            self._turn = states[self.rank]["turn"]
            self._positions = positions[self.rank * readers : (self.rank + 1) * readers]
            self._sampler = interrupted
        else:
            self._positions = [(first, 0, 0)] * self._readers
            resumed_from = ResumedFrom(interrupted, tuple(positions))
            self._sampler = replace(self._sampler, resumed_from=resumed_from)
