"""Files that are whole or absent, and the checkpoints of a run made of them.

A checkpoint is written beside its place, brought to the disk, renamed, and only then pointed to: whenever the
process is killed, the file named by `latest` is complete. One file holds all, also of a model that is divided
over ranks: rank 0 puts it together in its host's memory, in the background, so that any number of ranks, with
copies or shards, goes on from what any other wrote. (The format of torch.distributed.checkpoint, a folder of
shards, would have to be unpickled to be read.)
"""

import errno
import os
import re
import shutil
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pixio.engine.runtime import GIB, Runtime

_CHECKPOINT = re.compile(r"step_(\d{8,})\.pt")
_POINTER = "latest"


def write_atomic(path: str | os.PathLike, writer: Callable[[BinaryIO], object]) -> None:
    """Write a file that is never seen incomplete: `writer(file)` fills another, which then takes its name.

    Args:
        path: the file to make or replace; its folder exists.
        writer: called once with the binary file to write to.

    Raises:
        OSError: the disk refused; `path` is what it was and nothing is left beside it.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name must reach the disk too; systems without this flag cannot
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_checkpoint(path: str | os.PathLike, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint into CPU memory, mapped from the file, without running anything it contains.

    Args:
        path: a file that `Checkpoints` wrote.
        verify: also compare every byte with the stored check sums (one pass over the file).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or holds other things than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if verify:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"wrong check sum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can fail anywhere inside the readers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is truncated, damaged or not a checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds one {type(state).__name__}")
    return state


class Checkpoints:
    """The checkpoints in one folder: `step_00000100.pt`, …, and `latest`, which holds the name of the newest.

    `save`, `wait` and `load_latest` are collective: all ranks call them, rank 0 writes, all succeed or all
    raise.

    Args:
        folder: made when missing.
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
    ) -> Path:
        """Write `state` and `{"step": step}`, point to it, then remove what need not be kept.

        Args:
            step: optimiser steps taken so far.
            state: tensors (shards too), numbers, text, and dictionaries, lists and tuples of them.
            exports: further files to make when the checkpoint is complete; each function is called on rank 0
                with `state`, all tensors whole and on the host, and returns what is written.
            wait: return when all is on the disk; else when a copy of `state` is made, which may then change.

        Returns:
            The file.

        Raises:
            TypeError: `state` holds something that could not be read back safely.
            OSError: the disk is full or refused, in this save or in one that was not waited for; the previous
                checkpoint is untouched.
        """
        self.wait()
        path = self._path(step)
        state = {**state, "step": step}
        size = sum(_storages(state).values())
        copy = _map(state, Tensor, partial(_on_host, runtime=self.runtime))
        self._pending = self._writer.submit(self._finish, path, copy, size, exports or {})
        if wait:
            self.wait()
        return path

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
        path: Path,
        state: dict[str, Any],
        size: int,
        exports: Mapping[str | os.PathLike, Callable[[dict[str, Any]], Any]],
    ) -> str | None:
        """Put shards together on rank 0 and write all; returns what went wrong."""
        state = _map(state, _Part, partial(_assemble, runtime=self.runtime))
        if not self.runtime.is_main:
            return None
        try:
            self._write(path, state, size)
            for file, part_of in exports.items():
                write_atomic(file, partial(torch.save, part_of(state)))
        except (OSError, RuntimeError) as error:
            reason = error
            while reason.__context__:  # what torch met first, when it fails again in closing the file
                reason = reason.__context__
            free = shutil.disk_usage(self.folder).free / GIB if self.folder.is_dir() else 0.0
            return (
                f"could not save {path}: {reason} ({size / GIB:.3f} GiB needed, {free:.3f} GiB free). "
                "Earlier checkpoints are untouched"
            )
        return None

    def load_latest(self) -> dict[str, Any] | None:
        """The newest checkpoint, its step under `"step"`, or None in a folder without any.

        Raises:
            ValueError: it is missing or damaged; nothing older is loaded instead, the message says how to.
        """
        name = self.runtime.gather(self._newest() if self.runtime.is_main else None)[0]
        if name is None:
            return None
        pointer = self.folder / _POINTER
        match = _CHECKPOINT.fullmatch(name)
        if not match:
            raise ValueError(f"{pointer} holds {name[:80]!r}, which is not the name of a checkpoint")
        state = failure = None
        try:
            state = read_checkpoint(self.folder / name, verify=self.runtime.is_main)
        except (OSError, ValueError) as error:
            failure = str(error)
        failures = [text for text in self.runtime.gather(failure) if text]
        if failures:
            older = [path.name for step, path in self._saved() if step < int(match[1])]
            remedy = (
                f"To go on from {older[-1]}, write that name into {pointer}"
                if older
                else f"There is no older one: to start again, empty {self.folder}"
            )
            raise ValueError(f"{failures[0]}. {remedy}")
        return state

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.pt"

    def _saved(self) -> list[tuple[int, Path]]:
        """All complete checkpoints with their steps, in order."""
        found = [(_CHECKPOINT.fullmatch(path.name), path) for path in self.folder.glob("step_*.pt")]
        return sorted((int(match[1]), path) for match, path in found if match)

    def _newest(self) -> str | None:
        """The name pointed to; without a pointer (killed before its first) the newest, which is complete."""
        pointer = self.folder / _POINTER
        if pointer.is_file():
            return pointer.read_text().strip()
        saved = self._saved()
        return saved[-1][1].name if saved else None

    def _write(self, path: Path, state: dict[str, Any], size: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (".step_*.pt.*.tmp", f".{_POINTER}.*.tmp"):
            for leftover in self.folder.glob(pattern):  # of a process killed while writing
                leftover.unlink()
        if shutil.disk_usage(self.folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomic(path, lambda file: torch.save(state, file))
        write_atomic(self.folder / _POINTER, lambda file: file.write(path.name.encode() + b"\n"))

        # Later files, if any, belong to a future somebody went back from: they are not ours to judge.
        past = [(step, file) for step, file in self._saved() if step <= state["step"]]
        for step, file in past[: -self.keep_newest]:
            if not self.keep_every or step % self.keep_every:
                file.unlink()


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


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load "model" and "optimizer" of a checkpoint; of what is divided over ranks, each takes its part."""
    like = dict(model.named_parameters())
    model.load_state_dict({name: _share(tensor, like.get(name)) for name, tensor in saved["model"].items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: _share(value, parameters[index]) for name, value in values.items()}
        for index, values in saved["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**saved["optimizer"], "state": moments})


def _share(value: Any, like: Tensor | None) -> Any:
    """This rank's part of a whole tensor that belongs to the shard `like`; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _map(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """`value` with every part of a `kind` replaced, one after the other in the order of `value`."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(part, kind, function) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(part, kind, function) for part in value)
    return value


class _Part(NamedTuple):
    """A rank's rows of a tensor that is divided over `owners`, on its host."""

    rows: Tensor
    shape: torch.Size
    owners: list[int]


def _on_host(tensor: Tensor, runtime: Runtime) -> Tensor | _Part | None:
    """A copy of what this rank contributes: its shard; or, on rank 0, a tensor that all ranks have."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        assert tensor.placements[-1] == Shard(0), tensor.placements
        mesh = tensor.device_mesh.mesh
        owners = mesh.reshape(-1, mesh.shape[-1])[0].tolist()  # of the first copy
        return _Part(tensor.to_local().to("cpu", copy=True), tensor.shape, owners)
    return tensor.to("cpu", copy=True) if runtime.is_main else None


def _assemble(part: _Part, runtime: Runtime) -> Tensor | None:
    """The whole tensor on rank 0, exchanged between hosts; None elsewhere."""
    if not runtime.is_main:
        if runtime.rank in part.owners and part.rows.numel():
            dist.send(part.rows, dst=0, group=runtime.host_group)
        return None
    whole = torch.empty(part.shape, dtype=part.rows.dtype)
    chunks = whole.chunk(len(part.owners))  # can be fewer: the last owners then hold nothing
    for owner, rows in zip(part.owners[: len(chunks)], chunks, strict=True):
        if owner == 0:
            rows.copy_(part.rows)
        else:
            dist.recv(rows, src=owner, group=runtime.host_group)
    return whole


def _storages(value: Any, name: str = "state") -> dict[int, int]:
    """Bytes of each tensor storage inside `value`, by address, as torch.save writes them: shared ones once.

    Raises:
        TypeError: a part is of a type that a reader without pickle would refuse.
    """
    if isinstance(value, DTensor):
        return {id(value): value.numel() * value.element_size()}
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if type(value) in (dict, OrderedDict):
        parts = value.items()
    elif type(value) in (list, tuple):
        parts = enumerate(value)
    elif value is None or type(value) in (bool, int, float, str):
        return {}
    else:
        raise TypeError(f"{name} is a {type(value).__name__}: checkpoints hold only tensors and plain values")
    found = {}
    for key, part in parts:
        found |= _storages(part, f"{name}[{key!r}]")
    return found
