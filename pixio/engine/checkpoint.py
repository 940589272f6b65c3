"""Files that are whole or absent, and the checkpoints of a run made of them.

A checkpoint is a folder: the tensors in safetensors files, of which each rank writes those that it holds, and
`state.pt`, the plain values beside them. It is written aside, brought to the disk, renamed, and only then
pointed to: whenever the run is killed, the checkpoint named by `latest` is complete. Any number of ranks,
with copies of the model or with shards, goes on from what any other wrote, each reading only what it needs.
"""

import contextlib
import errno
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

from pixio.engine.runtime import GIB, Runtime
from pixio.engine.storage import Stored, check_parts, checksum, file_of, read_tensors, write_tensors
from pixio.files import fsync, write_atomic

_CHECKPOINT = re.compile(r"step_(\d{8,})(?:-(\d+))?")
_POINTER, _VALUES = "latest", "state.pt"


def read_checkpoint(path: str | os.PathLike, verify: slice = slice(None)) -> dict[str, Any]:
    """Read the plain values of a checkpoint; its tensors stay in their files, see `fetch` and `restore`.

    Args:
        path: a folder that `Checkpoints` wrote.
        verify: which of its files of tensors to compare, byte for byte, with their check sums.

    Returns:
        What was saved, with a `Stored` in the place of each tensor.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: something of it is missing, truncated, damaged, or neither tensors nor plain values.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if not (path / _VALUES).is_file():
            raise ValueError(f"it holds no {_VALUES}; a checkpoint is a folder checkpoints/step_… of a run")
        with zipfile.ZipFile(path / _VALUES) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong check sum of {damaged} in {_VALUES}")
        content = torch.load(path / _VALUES, map_location="cpu", weights_only=True)
        files, chunks = content["files"], content["chunks"]
        for name, size, crc in files[verify]:
            file = file_of(path, name)
            if (found := file.stat().st_size) != size:
                raise ValueError(f"{name} has {found:,} of {size:,} bytes")
            if checksum(file) != crc:
                raise ValueError(f"wrong check sum of {name}")
        names = [name for name, _, _ in files]

        def stored(name: str, tensor: Tensor) -> Stored:
            return check_parts(Stored(path, name, tensor.shape, tensor.dtype, names, chunks[name]))

        return _map(content["values"], stored)
    except Exception as error:  # a damaged file can fail anywhere inside the readers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is truncated, damaged or not a checkpoint: {reason}") from error


def fetch(value: Any) -> Any:
    """A part of what `read_checkpoint` returned, with whole tensors, in host memory, for what is `Stored`.

    Raises:
        ValueError: see `read_tensors`; or the tensors are larger than their files.
    """
    targets, asked, files = [], 0, set()

    def measure(_, stored: Stored) -> None:
        nonlocal asked
        asked += prod(stored.shape) * stored.dtype.itemsize
        files.update((stored.folder, stored.files[number]) for number in stored.chunks[:, 0].tolist())

    _map(value, measure, kind=Stored)
    if asked > (there := sum(file_of(*file).stat().st_size for file in files)):  # before memory is asked for
        raise ValueError(f"tensors of {asked:,} bytes cannot lie in files of {there:,} bytes")

    def make_room(_, stored: Stored) -> Tensor:
        targets.append((torch.empty(stored.shape, dtype=stored.dtype), stored))
        return targets[-1][0]

    whole = _map(value, make_room, kind=Stored)
    read_tensors(targets)
    return whole


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load "model" and "optimizer" of a checkpoint in place; of what is in shards each rank reads its own.

    Of the optimizer what it has gathered, not its settings: those are this run's.

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
    targets = [(tensors[name], stored) for name, stored in saved["model"].items()]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def make_room(parameter: Tensor, stored: Stored) -> Tensor:
        alike = stored.shape == parameter.shape  # else a count of steps, which the optimizer puts into place
        if not alike and stored.shape:
            raise ValueError(
                f"{stored.folder}: {stored.name} is {tuple(stored.shape)}, expected {tuple(parameter.shape)}"
            )
        room = torch.empty_like(parameter) if alike else torch.empty((), dtype=stored.dtype)
        targets.append((room, stored))
        return room

    moments = {
        index: _map(values, lambda _, stored, index=index: make_room(parameters[index], stored), kind=Stored)
        for index, values in saved["optimizer"]["state"].items()
    }
    read_tensors(targets)
    optimizer.load_state_dict({"param_groups": groups, "state": moments})


class Checkpoints:
    """The checkpoints in one folder: `step_00000100`, …, and `latest`, which holds the name of the newest.

    `save`, `wait`, `load` and `load_latest` are collective: all ranks call them, all succeed or all raise.
    What every rank has is written by rank 0.

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
        self.folder = Path(folder)
        self.runtime = runtime
        self.keep_newest = keep_newest
        self.keep_every = keep_every
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[str | None] | None = None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        exports: Mapping[str | os.PathLike, Callable[[dict[str, Any]], Any]] | None = None,
        wait: bool = True,
    ) -> None:
        """Write `state` and `{"step": step}`, point to it, then remove what need not be kept.

        Args:
            step: optimizer steps taken so far.
            state: tensors (shards too), numbers, text, and dictionaries, lists and tuples of them.
            exports: further files to make, before the checkpoint is pointed to; each function is called on
                rank 0 with what `read_checkpoint` gives, and returns the part that is written, fetched.
            wait: return when all is on the disk; else when a copy of `state` is made, which may then change.

        Raises:
            TypeError: `state` holds something that could not be read back safely.
            OSError: the disk is full or refused, in this save or in one that was not waited for; the previous
                checkpoint is untouched.
        """
        self.wait()
        tensors, sizes = {}, {}

        def describe(name: str, tensor: Tensor) -> Tensor:
            assert name not in sizes, f"two tensors would be called {name}"
            sizes[name] = tensor.numel() * tensor.element_size()
            if _is_of_first_copy(tensor) if isinstance(tensor, DTensor) else self.runtime.is_main:
                tensors[name] = tensor.detach().to("cpu", copy=True)
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        values = _map({**state, "step": step}, describe)
        size = sum(sizes.values())
        self._pending = self._writer.submit(self._finish, step, values, tensors, size, exports or {})
        if wait:
            self.wait()

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

    def _finish(
        self,
        step: int,
        values: dict[str, Any],
        tensors: dict[str, Tensor],
        size: int,
        exports: Mapping[str | os.PathLike, Callable[[dict[str, Any]], Any]],
    ) -> str | None:
        """Write all, in the background; returns what went wrong."""
        group = self.runtime.host_group
        if group is None and not self.runtime.is_main:
            return None
        aside = self.folder / f".step_{step:08d}.tmp"
        try:
            self._prepare(aside, size)
            placed = write_tensors(aside, tensors, group)
            tensors.clear()  # room for what is exported
            if self.runtime.is_main:
                content = {"values": values, "files": placed.files, "chunks": placed.chunks}
                write_atomic(aside / _VALUES, partial(torch.save, content))
                written = read_checkpoint(aside, verify=slice(0))
                for file, part_of in exports.items():
                    _remove_leftovers(Path(file))
                    write_atomic(file, partial(torch.save, fetch(part_of(written))))
                self._publish(aside, step)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            reason = error
            # what torch met first, when it fails again in closing the file
            while reason.__context__ and not reason.__suppress_context__:
                reason = reason.__context__
            free = 0.0
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self.folder).free / GIB
            if self.runtime.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            return (
                f"could not save {self.folder / f'step_{step:08d}'}: {reason} ({size / GIB:.3f} GiB needed, "
                f"{free:.3f} GiB free). Earlier checkpoints are untouched"
            )
        return None

    def _prepare(self, aside: Path, size: int) -> None:
        """Make the empty folder `aside`; all ranks learn when that fails."""
        failure = None
        if self.runtime.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(".*.tmp"):  # of a process killed while saving
                    if leftover.is_dir():
                        shutil.rmtree(leftover, ignore_errors=True)  # network file systems keep what is open
                    else:
                        leftover.unlink()
                if shutil.disk_usage(self.folder).free < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                aside.mkdir()
            except Exception as error:
                failure = error
        if self.runtime.host_group is not None:
            told = [failure]
            dist.broadcast_object_list(told, src=0, group=self.runtime.host_group)
            failure = told[0]
        if failure is not None:
            raise failure

    def _publish(self, aside: Path, step: int) -> None:
        """Name the complete checkpoint `aside`, point to it, and remove what need not be kept."""
        path = self.folder / f"step_{step:08d}"
        for attempt in itertools.count(1):  # somebody went back: what is pointed to stays until we are done
            if not path.exists():
                break
            path = self.folder / f"step_{step:08d}-{attempt}"
        os.replace(aside, path)
        fsync(self.folder)  # before the pointer can be there
        write_atomic(self.folder / _POINTER, lambda file: file.write(path.name.encode() + b"\n"))

        # Later ones, if any, belong to a future somebody went back from: they are not ours to judge.
        past = [(at, other) for at, _, other in self._saved() if at <= step and other != path]
        for position, (at, other) in enumerate(reversed(past), start=2):
            kept = position <= self.keep_newest or (self.keep_every and at % self.keep_every == 0)
            if at == step or not kept:
                # The new one is safe whatever happens here: network file systems keep what somebody reads.
                with contextlib.suppress(OSError):
                    gone = other.with_name(f".{other.name}.tmp")
                    os.replace(other, gone)
                    shutil.rmtree(gone)

    def load(self, path: str | os.PathLike) -> dict[str, Any]:
        """What `read_checkpoint` gives for a checkpoint anywhere, of whose files each rank verifies a share.

        Raises:
            ValueError: on every rank, when it is missing or one has found it damaged.
        """
        state = failure = None
        try:
            state = read_checkpoint(path, slice(self.runtime.rank, None, self.runtime.world_size))
        except (OSError, ValueError) as error:
            failure = str(error)
        failures = [text for text in self.runtime.gather(failure) if text]
        if failures:
            raise ValueError(failures[0])
        return state

    def load_latest(self) -> dict[str, Any] | None:
        """The newest checkpoint as `read_checkpoint` gives it, or None in a folder without any.

        Raises:
            ValueError: it is missing or damaged; nothing older is loaded instead, the message says how to.
        """
        name = failure = None
        if self.runtime.is_main:
            try:
                name = self._newest()
            except OSError as error:
                failure = str(error)
        name, failure = self.runtime.gather((name, failure))[0]
        if failure:
            raise ValueError(f"{self.folder} cannot be read: {failure}")
        if name is None:
            return None
        pointer = self.folder / _POINTER
        match = _CHECKPOINT.fullmatch(name)
        if not match:
            raise ValueError(f"{pointer} holds {name[:80]!r}, which is not the name of a checkpoint")
        try:
            return self.load(self.folder / name)
        except ValueError as error:
            older = [path.name for step, _, path in self._saved() if step < int(match[1])]
            remedy = (
                f"To go on from {older[-1]}, write that name into {pointer}"
                if older
                else f"There is no older one: to start again, empty {self.folder}"
            )
            raise ValueError(f"{error}. {remedy}") from error

    def _saved(self) -> list[tuple[int, int, Path]]:
        """All complete checkpoints, in order: step, attempt at this step, folder."""
        found = [(_CHECKPOINT.fullmatch(path.name), path) for path in self.folder.glob("step_*")]
        return sorted((int(match[1]), int(match[2] or 0), path) for match, path in found if match)

    def _newest(self) -> str | None:
        """The name pointed to; without a pointer (killed before its first) the newest, which is complete."""
        pointer = self.folder / _POINTER
        if pointer.is_file():
            return pointer.read_text(errors="replace").strip()
        saved = self._saved()
        return saved[-1][2].name if saved else None


def _remove_leftovers(file: Path) -> None:
    """Remove what processes that were killed in `write_atomic` have left beside `file`."""
    for leftover in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


class Interval:
    """Due every `steps` steps, and when `minutes` have passed since it was last due; 0 switches either off.

    Rank 0's clock decides for all: with `minutes`, `due` is a collective that waits for the device.
    """

    def __init__(self, runtime: Runtime, steps: int = 0, minutes: float = 0.0) -> None:
        if steps < 0 or minutes < 0:
            raise ValueError(f"an interval cannot be negative: found {steps} steps, {minutes} minutes")
        self.runtime = runtime
        self.steps = steps
        self.minutes = minutes
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time, `step` steps having been taken; the same answer on every rank."""
        due = self.steps > 0 and step % self.steps == 0
        if not due and self.minutes > 0:
            late = time.monotonic() - self._since >= 60 * self.minutes
            due = self.runtime.any(self.runtime.is_main and late)
        if due:
            self._since = time.monotonic()
        return due


def _is_of_first_copy(shard: DTensor) -> bool:
    """Whether this rank's part is one of the first copy's, where machines hold copies."""
    return not any(shard.device_mesh.get_coordinate()[:-1])


def _map(value: Any, function: Callable[[str, Any], Any], kind: type = Tensor, name: str = "") -> Any:
    """Plain `value` with `function(name, part)` for each part of a `kind`, whose name is the path to it.

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
