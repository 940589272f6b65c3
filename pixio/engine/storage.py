"""Tensors in a folder of safetensors files: each rank writes its part, and reads the part it needs.

The storage under torch.distributed.checkpoint, which plans who writes and who reads what. The ones it brings
describe the files in a pickle, or have every rank open every file; here a table says where each tensor lies.
"""

import dataclasses
import os
import warnings
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

# torch remarks each time that a process which saves or loads for itself does so
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class Placed(NamedTuple):
    """Where the tensors of a folder lie.

    files: of each file its name, bytes and check sum (CRC-32).
    chunks: of each tensor int64 [n, 1 + 2 * dimensions]: for each of its parts the number of the file in
        `files`, the part's first position along each dimension, and its size.
    """

    files: list[tuple[str, int, int]]
    chunks: dict[str, Tensor]


class Stored(NamedTuple):
    """A tensor that is still in its files; see `Placed`."""

    folder: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype
    files: list[str]
    chunks: Tensor


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> Placed | None:
    """Write what this rank holds of `tensors`, and bring it to the disk.

    Collective over `group`, whose first rank learns where all lies; without one this process writes alone.

    Args:
        folder: exists.
        tensors: in host memory, shards too; names are the same on all ranks that hold a shard, and what two
            ranks hold alike is given on one of them.

    Raises:
        OSError: on every rank, when one could not write.
    """
    writer = _Writer(folder)
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            planner=planner,
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise OSError(_first_failure(error)) from error
    return writer.placed


def read_tensors(targets: Iterable[tuple[Tensor, Stored]]) -> None:
    """Fill tensors, or this rank's shards of them, from their files; each rank for itself.

    Args:
        targets: of one folder; a tensor's shape is the stored one's.

    Raises:
        ValueError: a file is missing or damaged or leads out of the folder, or a shape is another.
    """
    targets = list(targets)
    if not targets:
        return
    folder = targets[0][1].folder
    if len({stored.name for _, stored in targets}) < len(targets):
        raise ValueError(f"{folder} cannot be read: two of its tensors have one name")
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(
            {stored.name: target.detach() for target, stored in targets},
            storage_reader=_Reader([stored for _, stored in targets]),
            planner=planner,
            no_dist=True,
        )
    except CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {_first_failure(error)}") from error


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of any new file; the library would keep it private.

    Args:
        tensors: contiguous, in host memory, none a part of another.
        path: the file to make or replace.
        metadata: text in its header.
    """
    from safetensors.torch import save_file  # here, so that only who writes needs it

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


def file_of(folder: Path, name: str) -> Path:
    """A file of a folder that may come from anywhere.

    Raises:
        ValueError: it leads out of the folder, or is not a plain file there.
    """
    path = folder / name
    if Path(name).name != name or path.resolve().parent != folder.resolve():
        raise ValueError(f"{name!r} leads out of {folder}")
    if not path.is_file():
        raise ValueError(f"{name} is missing")
    return path


def check_parts(stored: Stored) -> Stored:
    """`stored`, whose parts are whole rows and make up the tensor: each number once, none left unset.

    Raises:
        ValueError: they do not.
    """
    dimensions, rows = len(stored.shape), stored.chunks
    shape = [*stored.shape] or [1]
    if rows.dtype != torch.int64 or rows.shape[1:] != (1 + 2 * dimensions,):
        raise ValueError(f"{stored.name} has no table of parts")
    end = 0
    for number, *corner in sorted(rows.tolist(), key=lambda row: row[1:]):
        offsets, sizes = corner[:dimensions] or [0], corner[dimensions:] or [1]
        expected = ([end, *[0] * (len(shape) - 1)], [sizes[0], *shape[1:]])
        if (offsets, sizes) != expected or sizes[0] < 0 or not 0 <= number < len(stored.files):
            raise ValueError(f"parts of {stored.name} are missing or overlap")
        end += sizes[0]
    if end != shape[0]:
        raise ValueError(f"parts of {stored.name} are missing: {end} of {shape[0]} rows are there")
    return stored


def _first_failure(error: CheckpointException) -> str:
    reason = next(iter(error.failures.values()))[0]
    return (str(reason) or type(reason).__name__).splitlines()[0]


class _Written(NamedTuple):
    """What a rank tells the first about its file; of each tensor's part there the offsets and sizes."""

    file: str
    bytes: int
    crc: int
    parts: dict[str, list[int]]


class _Planner(dcp.DefaultSavePlanner):
    """Lets each rank write all that it was given.

    torch would gather, compare and send back descriptions of all parts of all tensors, for which Python takes
    minutes with hundreds of ranks that hold shards of large models.
    """

    def create_local_plan(self) -> dcp.SavePlan:
        self._own = super().create_local_plan().items
        return dcp.SavePlan([])

    def create_global_plan(self, all_plans: list[dcp.SavePlan]) -> tuple[list[dcp.SavePlan], Metadata]:
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
        return super().finish_plan(dataclasses.replace(new_plan, items=self._own))


class _Writer(dcp.StorageWriter):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.placed: Placed | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        tensors, parts = {}, {}
        for item in plan.items:
            chunk = item.tensor_data.chunk
            if 0 in item.tensor_data.size or 0 not in chunk.sizes:  # of few rows not every rank has one
                tensors[item.index.fqn] = planner.resolve_data(item).contiguous()
                parts[item.index.fqn] = [*chunk.offsets, *chunk.sizes]
        results = []
        if tensors:
            path = self.folder / f"rank_{plan.storage_data:05d}.safetensors"
            write_safetensors(tensors, path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            written = _Written(path.name, path.stat().st_size, checksum(path), parts)
            results.append(WriteResult(MetadataIndex(path.name), written.bytes, written))
        future = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result.storage_data for rank in results for result in rank]
        chunks: dict[str, list[list[int]]] = {}
        for number, file in enumerate(written):
            for name, part in file.parts.items():
                chunks.setdefault(name, []).append([number, *part])
        files = [(file.file, file.bytes, file.crc) for file in written]
        self.placed = Placed(files, {name: torch.tensor(rows) for name, rows in chunks.items()})


class _Reader(dcp.StorageReader):
    def __init__(self, tensors: list[Stored]) -> None:
        self.files = {}  # folder and name, of each part: by the tensor's name and the part's offsets
        described = {}
        for stored in tensors:
            chunks = []
            for number, *corner in stored.chunks.tolist():
                offsets, sizes = corner[: len(stored.shape)], corner[len(stored.shape) :]
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                self.files[stored.name, tuple(offsets)] = stored.folder, stored.files[number]
            described[stored.name] = TensorStorageMetadata(
                TensorProperties(dtype=stored.dtype), stored.shape, chunks
            )
        self.metadata = Metadata(described)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        from safetensors import safe_open

        per_file = {}
        for item in plan.items:
            file = self.files[item.storage_index.fqn, tuple(item.storage_index.offset)]
            per_file.setdefault(file, []).append(item)
        for place, items in per_file.items():
            file = file_of(*place)
            with safe_open(file, framework="pt") as tensors:
                for item in items:
                    part = tensors.get_tensor(item.storage_index.fqn)  # mapped: only what is taken is read
                    for dim, (offset, length) in enumerate(
                        zip(item.storage_offsets, item.lengths, strict=True)
                    ):
                        part = part.narrow(dim, offset, length)
                    target = planner.resolve_tensor(item).detach()
                    if target.shape != part.shape:
                        raise ValueError(
                            f"{file}: {item.storage_index.fqn} is {tuple(part.shape)}, "
                            f"expected {tuple(target.shape)}"
                        )
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        future = Future()
        future.set_result(None)
        return future
