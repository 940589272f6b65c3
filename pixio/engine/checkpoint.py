"""The checkpoints of a run: written to a temporary folder, fsynced, renamed, and only then published.

A checkpoint is a folder: the tensors in safetensors files, of which each rank writes those that it holds, and
`state.pt`, the plain values beside them. Whenever the run is killed, the checkpoint named by `latest` is
complete. Any number of ranks, with copies of the model or with shards, resumes from what any other wrote, and
each reads only what it needs.
"""

import contextlib
import glob
import itertools
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixio.engine.host_copies import HostCopies
from pixio.engine.runtime import Runtime
from pixio.engine.tensor_files import (
    Rows,
    TensorReference,
    checksum,
    local_rows,
    read_tensors,
    take_turns,
    write_tensors,
)
from pixio.files import (
    check_archive,
    file_in,
    fsync,
    parts_of,
    remove_leftovers,
    require_free,
    write_atomic,
    write_text,
)

_CHECKPOINT = re.compile(r"step_(\d{8,})(?:-(\d+))?")
_POINTER, _VALUES = "latest", "state.pt"


def read_checkpoint(path: str | os.PathLike, verify: slice = slice(None)) -> dict[str, Any]:
    """Read the plain values of a checkpoint; tensors stay in their files, see `materialize` and `restore`.

    Args:
        path: a folder that `Checkpoints` wrote.
        verify: which of its tensor files to compare, byte for byte, with their checksums.

    Returns:
        What was saved, with a `TensorReference` in the place of each tensor.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: something of it is missing, truncated, damaged, or neither tensors nor plain values.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path.absolute()}")
    try:
        if not (path / _VALUES).is_file():
            raise ValueError(f"it holds no {_VALUES}; a checkpoint is a folder checkpoints/step_… of a run")
        values = file_in(path, _VALUES)
        check_archive(values)
        with zipfile.ZipFile(values) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged} in {_VALUES}")
        content = torch.load(values, map_location="cpu", weights_only=True)
        for _ in parts_of(content, values.stat().st_size):
            pass
        files, chunks = content["files"], content["chunks"]
        for name, size, crc in files[verify]:
            file = file_in(path, name)
            if (found := file.stat().st_size) != size:
                raise ValueError(f"{name} has {found:,} of {size:,} bytes")
            if checksum(file) != crc:
                raise ValueError(f"wrong checksum of {name}")
        return _refer(content["values"], path, files, chunks)
    except Exception as error:  # a damaged file can fail anywhere inside the readers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path.absolute()} is truncated, damaged or not a checkpoint: {reason}") from error


def _refer(
    values: Any, folder: Path, files: list[tuple[str, int, int]], chunks: Mapping[str, Tensor]
) -> dict[str, Any]:
    """`values` with a reference into `folder` for each tensor; see `ShardIndex` for the others."""
    names = [name for name, _, _ in files]

    def refer(name: str, tensor: Tensor) -> TensorReference:
        reference = TensorReference(folder, name, tensor.shape, tensor.dtype, names, chunks[name])
        reference.parts()  # raises where they do not make up the tensor
        return reference

    return _map(values, refer)


def materialize(value: Any, held: Mapping[str, Rows] | None = None) -> Any:
    """A part of what `read_checkpoint` returned, its references replaced by whole tensors in host memory.

    Args:
        value: the part.
        held: by name, what this rank wrote of the tensors: not read again, and given as it is where whole.

    Raises:
        ValueError: see `read_tensors`; or the tensors are larger than their files.
    """
    targets: list[tuple[Tensor, TensorReference]] = []
    needed, files = 0, set[tuple[Path, str]]()

    def measure(_, reference: TensorReference) -> None:
        nonlocal needed
        needed += prod(reference.shape) * reference.dtype.itemsize
        files.update((reference.folder, reference.files[index]) for index, *_ in reference.parts())

    _map(value, measure, kind=TensorReference)
    if needed > (stored := sum(file_in(*file).stat().st_size for file in files)):  # before allocating
        raise ValueError(f"tensors of {needed:,} bytes cannot lie in files of {stored:,} bytes")

    held = held or {}

    def allocate(name: str, reference: TensorReference) -> Tensor:
        if (mine := held.get(reference.name)) and mine.rows.shape == reference.shape:
            return mine.rows
        targets.append((torch.empty(reference.shape, dtype=reference.dtype), reference))
        return targets[-1][0]

    whole = _map(value, allocate, kind=TensorReference)
    read_tensors(targets, held)
    return whole


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Load "model", "optimizer" and "scaler" of a checkpoint in place; of shards each rank reads its own.

    The optimizer's moments are loaded, not its settings: those are this run's. The scaler starts afresh where
    the checkpoint is of a run that needed none (it computed in bf16 or fp32).

    Raises:
        ValueError: the checkpoint is of another model, or cannot be read.
    """
    tensors = model.state_dict()
    if different := tensors.keys() ^ saved["model"].keys():
        raise ValueError(
            f"the checkpoint is of another model: only one of them has {', '.join(sorted(different)[:4])}"
        )
    groups = optimizer.state_dict()["param_groups"]
    if (before := [g["params"] for g in saved["optimizer"]["param_groups"]]) != [g["params"] for g in groups]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {', '.join(str(len(group)) for group in before)} "
            f"parameters, expected {', '.join(str(len(group['params'])) for group in groups)}"
        )
    targets = [(tensors[name], reference) for name, reference in saved["model"].items()]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def moments_of(parameter: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        def allocate(_, reference: TensorReference) -> Tensor:
            scalar = not reference.shape and parameter.ndim  # a step count, which the optimizer places
            targets.append(
                (torch.empty((), dtype=reference.dtype) if scalar else torch.empty_like(parameter), reference)
            )
            return targets[-1][0]

        return _map(values, allocate, kind=TensorReference)

    moments = {
        index: moments_of(parameters[index], values) for index, values in saved["optimizer"]["state"].items()
    }
    read_tensors(targets)
    optimizer.load_state_dict({"param_groups": groups, "state": moments})
    if scaler is not None and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])


class Checkpoints:
    """The checkpoints in one folder: `step_00000100`, …, and `latest`, which holds the name of the newest.

    `save`, `wait`, `load` and `load_latest` are collective: all ranks call them, all succeed or all raise.
    Tensors that every rank holds are written by rank 0; nodes with copies of the same shards share the work.
    Between saves the copies in host memory stay, for the next one.

    Args:
        folder: made when missing; all ranks see it.
        runtime: the ranks that share the folder.
        keep_newest: how many of the newest to keep.
        keep_every: keep also every checkpoint whose step is a multiple of this; 0 keeps none for that reason.
    """

    def __init__(
        self, folder: str | os.PathLike, runtime: Runtime, keep_newest: int = 2, keep_every: int = 0
    ) -> None:
        if keep_newest < 1 or keep_every < 0:
            raise ValueError(
                f"expected keep_newest >= 1 and keep_every >= 0, found {keep_newest} and {keep_every}"
            )
        import safetensors  # noqa: F401 (a run without it would end at its first save)

        self.folder = Path(folder)
        self.runtime = runtime
        self.keep_newest = keep_newest
        self.keep_every = keep_every
        self._copies = HostCopies(runtime.device, runtime.pins_memory)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[str | None] | None = None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        exports: Mapping[str | os.PathLike, Callable[[dict[str, Any]], Any]] | None = None,
        wait: bool = True,
    ) -> None:
        """Write and publish `state` and `{"step": step}`, then remove checkpoints that need not be kept.

        Args:
            step: optimizer steps taken so far.
            state: tensors (shards too), numbers, text, and dictionaries, lists and tuples of them.
            exports: further files to write, before the checkpoint is published; each function is called on
                rank 0 with what `read_checkpoint` gives, and returns the part to materialize and write.
            wait: return when all is on the disk; else as soon as `state` may change, on a GPU by optimizer
                steps only: its tensors are still being copied.

        Raises:
            TypeError: `state` holds something that could not be read back safely.
            OSError: the disk is full or refused, in this save or in one that was not waited for; the previous
                checkpoint is untouched.
        """
        self.wait()
        tensors, firsts, sizes = {}, {}, {}
        shares: dict[int, int] = {}  # bytes that each copy of the shards writes

        def take(name: str, tensor: Tensor) -> Tensor:
            assert name not in sizes, f"two tensors would be called {name}"
            sizes[name] = tensor.numel() * tensor.element_size()
            if take_turns(tensor, shares) if isinstance(tensor, DTensor) else self.runtime.is_main:
                first, rows = local_rows(tensor)
                if rows.numel() or not tensor.numel():  # of few rows not every rank has one
                    firsts[name], tensors[name] = first, rows
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        values = _map({**state, "step": step}, take)
        copies, finish_copying = self._copies.copy(tensors)
        held = {name: Rows(firsts[name], rows) for name, rows in copies.items()}
        size = sum(sizes.values())
        self._pending = self._writer.submit(
            self._write, step, values, held, finish_copying, size, exports or {}
        )
        if wait:
            self.wait()

    def failed(self) -> bool:
        """Whether this rank knows of a save that failed; `wait` raises its error, as the next save does."""
        return self._pending is not None and self._pending.done() and self._pending.result() is not None

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
            OSError: it failed.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            failure = self.runtime.gather(pending.result())[0]
            if failure:
                raise OSError(failure)

    def _write(
        self,
        step: int,
        values: dict[str, Any],
        held: dict[str, Rows],
        finish_copying: Callable[[], object],
        size: int,
        exports: Mapping[str | os.PathLike, Callable[[dict[str, Any]], Any]],
    ) -> str | None:
        """Write and publish a checkpoint, in the background; returns what went wrong, or None."""
        group = self.runtime.host_group
        if group is None and not self.runtime.is_main:
            return None
        temporary = self.folder / f".step_{step:08d}.tmp"
        try:
            self._make_folder(temporary, size)
            finish_copying()
            index = write_tensors(temporary, held, group)
            if self.runtime.is_main:
                assert index is not None
                content = {"values": values, "files": index.files, "chunks": index.chunks}
                write_atomic(temporary / _VALUES, partial(torch.save, content))
                written = _refer(values, temporary, index.files, index.chunks)
                for file, part_of in exports.items():
                    file = Path(file)
                    remove_leftovers(file.parent, glob.escape(file.name))
                    write_atomic(file, partial(torch.save, materialize(part_of(written), held)))
                self._publish(temporary, step)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            if self.runtime.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            return (
                f"could not save step {step} in {self.folder.absolute()}: {error}. "
                "Earlier checkpoints are untouched"
            )
        return None

    def _make_folder(self, temporary: Path, size: int) -> None:
        """Make the empty folder `temporary` for `size` bytes; all ranks raise when that fails."""
        failure = None
        if self.runtime.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.folder)  # of a process that was killed while saving
                for leftover in self.folder.glob(".step_*.tmp"):
                    shutil.rmtree(leftover, ignore_errors=True)  # network file systems keep what is open
                require_free(temporary, size)
                temporary.mkdir()
            except OSError as error:
                failure = str(error)
        if self.runtime.host_group is not None:
            shared = [failure]
            dist.broadcast_object_list(shared, src=0, group=self.runtime.host_group)
            failure = shared[0]
        if failure is not None:
            raise OSError(failure)

    def _publish(self, temporary: Path, step: int) -> None:
        """Rename a complete checkpoint, let `latest` name it, and remove those that need not be kept."""
        path, attempts = self.folder / f"step_{step:08d}", itertools.count(1)
        while path.exists():  # the run was rolled back: what `latest` names stays until we are done
            path = self.folder / f"step_{step:08d}-{next(attempts)}"
        os.replace(temporary, path)
        fsync(self.folder)  # before it is published
        write_text(self.folder / _POINTER, f"{path.name}\n")

        # Later ones, if any, are those of a run that was rolled back: they are not ours to judge.
        earlier = [(at, other) for at, _, other in self._saved() if at <= step and other != path]
        for position, (at, other) in enumerate(reversed(earlier), start=2):
            kept = position <= self.keep_newest or (self.keep_every and at % self.keep_every == 0)
            if at == step or not kept:
                # The new one is safe whatever happens here: network file systems keep files that are open.
                with contextlib.suppress(OSError):
                    removed = other.with_name(f".{other.name}.tmp")
                    os.replace(other, removed)
                    shutil.rmtree(removed)

    def load(self, path: str | os.PathLike) -> dict[str, Any]:
        """`read_checkpoint` of a checkpoint anywhere, of whose files each rank verifies a share.

        Raises:
            ValueError: on every rank, when it is missing or any rank found it damaged.
        """
        share = slice(self.runtime.rank, None, self.runtime.world_size)
        return self.runtime.agree(partial(read_checkpoint, path, share))

    def load_latest(self) -> dict[str, Any] | None:
        """The newest checkpoint as `read_checkpoint` gives it, or None in a folder without any.

        Raises:
            ValueError: it is missing or damaged; nothing older is loaded instead, the message says how to.
        """
        newest = self.runtime.agree(lambda: self._newest() if self.runtime.is_main else None)
        name = self.runtime.gather(newest)[0]
        if name is None:
            return None
        pointer = self.folder.absolute() / _POINTER
        match = _CHECKPOINT.fullmatch(name)
        if not match:
            raise ValueError(f"{pointer} holds {name[:80]!r}, which is not the name of a checkpoint")
        try:
            return self.load(self.folder / name)
        except ValueError as error:
            older = [path.name for step, _, path in self._saved() if step < int(match[1])]
            remedy = (
                f"To resume from {older[-1]}, write that name into {pointer}"
                if older
                else f"There is no older one: to start again, empty {self.folder.absolute()}"
            )
            raise ValueError(f"{error}. {remedy}") from error

    def _saved(self) -> list[tuple[int, int, Path]]:
        """All complete checkpoints, in order: step, attempt at this step, folder."""
        found = [(_CHECKPOINT.fullmatch(path.name), path) for path in self.folder.glob("step_*")]
        return sorted((int(match[1]), int(match[2] or 0), path) for match, path in found if match)

    def _newest(self) -> str | None:
        """The name in `latest`; without it (killed before the first was published) the newest there is."""
        pointer = self.folder / _POINTER
        if pointer.is_file():
            return pointer.read_text(errors="replace").strip()
        saved = self._saved()
        return saved[-1][2].name if saved else None


class Interval:
    """Due every `steps` steps, and `minutes` after it was last due; 0 switches either off."""

    def __init__(self, steps: int = 0, minutes: float = 0.0) -> None:
        if steps < 0 or minutes < 0:
            raise ValueError(f"an interval cannot be negative: found {steps} steps, {minutes} minutes")
        self.steps = steps
        self.minutes = minutes
        self._since = time.monotonic()

    def late(self) -> bool:
        """Whether `minutes` have passed by the clock of this process; ranks must agree on one."""
        return self.minutes > 0 and time.monotonic() - self._since >= 60 * self.minutes

    def due(self, step: int, late: bool) -> bool:
        """Whether it is time after `step` steps, with `late` as the ranks have agreed on it."""
        due = late or (self.steps > 0 and step % self.steps == 0)
        if due:
            self._since = time.monotonic()
        return due


def _map(value: Any, function: Callable[[str, Any], Any], kind: type = Tensor, name: str = "") -> Any:
    """`value` with each part of type `kind` replaced by `function(name, part)`; its name is the path to it.

    Raises:
        TypeError: a part is of a type that a reader without pickle would refuse.
    """
    if isinstance(value, kind):
        return function(name, value)
    if isinstance(value, dict):
        return {
            key: _map(part, function, kind, f"{name}/{key}" if name else str(key))
            for key, part in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(_map(part, function, kind, f"{name}/{i}") for i, part in enumerate(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}: checkpoints hold only tensors and plain values")
