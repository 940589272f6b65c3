"""Tensors in a folder of safetensors files: each rank writes the rows it holds and reads the rows it needs.

A table, not a pickle, says where each tensor is; no rank opens a file of which it needs nothing.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from pixio.files import disk_full, file_in, fsync


class Rows(NamedTuple):
    """What a rank holds of a tensor: its rows from `first` on; of a tensor without dimensions the tensor."""

    first: int
    rows: Tensor


class ShardIndex(NamedTuple):
    """Where the tensors of a folder are.

    files: name, bytes and checksum (CRC-32) of each file.
    chunks: for each tensor int64 [n, 1 + 2 * dimensions]; a row for each of its parts: index of the file in
        `files`, offset of the part along each dimension, and its size.
    """

    files: list[tuple[str, int, int]]
    chunks: dict[str, Tensor]


class TensorReference(NamedTuple):
    """A tensor that is still in its files; see `ShardIndex`."""

    folder: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype
    files: list[str]
    chunks: Tensor

    def parts(self) -> list[tuple[int, int, int]]:
        """Index of the file, first row and end of each part, in order; a scalar is one row.

        Raises:
            ValueError: the parts are not whole rows, or do not make up the tensor.
        """
        dimensions, shape = len(self.shape), [*self.shape] or [1]
        if self.chunks.dtype != torch.int64 or self.chunks.shape[1:] != (1 + 2 * dimensions,):
            raise ValueError(f"{self.name} has no table of parts")
        parts, end = [], 0
        for index, *corner in sorted(self.chunks.tolist(), key=lambda row: row[1:]):
            offsets, sizes = corner[:dimensions] or [0], corner[dimensions:] or [1]
            expected = ([end, *[0] * (len(shape) - 1)], [sizes[0], *shape[1:]])
            if (offsets, sizes) != expected or sizes[0] < 0 or not 0 <= index < len(self.files):
                raise ValueError(f"parts of {self.name} are missing or overlap")
            parts.append((index, end, end + sizes[0]))
            end += sizes[0]
        if end != shape[0]:
            raise ValueError(f"parts of {self.name} are missing: {end} of {shape[0]} rows are there")
        return parts


def write_tensors(
    folder: Path, tensors: Mapping[str, Rows], group: dist.ProcessGroup | None = None
) -> ShardIndex | None:
    """Write what this rank holds of tensors, and flush it to the disk.

    Collective over `group`, whose first rank returns where everything is; without one this process is alone.

    Args:
        folder: exists.
        tensors: in host memory; names are the same on all ranks that hold a shard, and what two ranks hold
            alike is given on one of them.

    Raises:
        OSError: on the first rank, when any could not write.
    """
    rank = 0 if group is None else dist.get_rank(group)
    written = failure = None
    try:
        written = _write_file(folder / f"rank_{rank:05d}.safetensors", tensors)
    except Exception as error:  # whatever it is, the first rank waits to hear of it
        failure = str(error) or type(error).__name__
    gathered = [(written, failure)]
    if group is not None:
        gathered *= dist.get_world_size(group)
        dist.gather_object((written, failure), gathered if rank == 0 else None, group=group)
    if rank > 0:
        return None
    if failures := [text for _, text in gathered if text]:
        raise OSError(failures[0])
    index = ShardIndex([], {})
    rows: dict[str, list[list[int]]] = {}
    for file, parts in (written for written, _ in gathered if written):
        for name, part in parts.items():
            rows.setdefault(name, []).append([len(index.files), *part])
        index.files.append(file)
    index.chunks.update({name: torch.tensor(parts) for name, parts in rows.items()})
    return index


def read_tensors(
    targets: Iterable[tuple[Tensor, TensorReference]], held: Mapping[str, Rows] | None = None
) -> None:
    """Fill tensors, or this rank's shards of them, from their files; each rank for itself.

    Args:
        targets: of one folder; a tensor's shape is that of its reference.
        held: by name, what this rank has written to these files and need not read again.

    Raises:
        ValueError: a file is missing or damaged or leads out of the folder, or a shape differs.
    """
    from safetensors import safe_open

    per_file: dict[str, list[tuple[Tensor, str, int, int, int]]] = {}
    folder, names, held = Path(), set(), held or {}
    for target, reference in targets:
        folder = reference.folder
        if reference.name in names:
            raise ValueError(f"{folder} cannot be read: two of its tensors have one name, {reference.name}")
        names.add(reference.name)
        if target.shape != reference.shape:
            raise ValueError(
                f"{folder}: {reference.name} is {tuple(reference.shape)}, expected {tuple(target.shape)}"
            )
        first, local = local_rows(target.detach())
        local = local if local.ndim else local[None]
        mine = held.get(reference.name)
        for index, start, end in reference.parts():
            if mine is not None and mine.first == start:
                _fill(local, first, mine.rows if mine.rows.ndim else mine.rows[None], start)
            elif start < first + len(local) and first < end:
                rows = (local, reference.name, first, start, end)
                per_file.setdefault(reference.files[index], []).append(rows)
    try:
        for name, wanted in per_file.items():
            with safe_open(file_in(folder, name), framework="pt") as file:
                for local, key, first, start, end in wanted:
                    part = file.get_tensor(key)  # mapped: only what is taken is read
                    part = part if part.ndim else part[None]
                    if part.shape != (shape := (end - start, *local.shape[1:])):
                        raise ValueError(f"{key} is {tuple(part.shape)} in {name}, expected {shape}")
                    _fill(local, first, part, start)
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} cannot be read: {reason}") from error


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of any new file; the library makes it readable by its
    owner only.

    Args:
        tensors: contiguous, in host memory, none a part of another.
        path: the file to make or replace.
        metadata: text in its header.
    """
    from safetensors.torch import save_file  # here, so that only who writes needs it

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    path.chmod(mode)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc, buffer = 0, memoryview(bytearray(2**20))  # which stays in the processor's cache
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
    return crc


def local_rows(tensor: Tensor) -> Rows:
    """What this rank holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return Rows(0, tensor)
    assert tensor.placements[-1].is_shard(0), f"shards of rows expected, found {tensor.placements}"
    per_rank = -(-len(tensor) // tensor.device_mesh.size(-1))
    return Rows(min(tensor.device_mesh.get_coordinate()[-1] * per_rank, len(tensor)), tensor.to_local())


def take_turns(shard: DTensor, shares: dict[int, int]) -> bool:
    """Whether this rank writes its shard of a tensor: of nodes with copies, the one with fewest bytes so far.

    Args:
        shard: this rank's.
        shares: index of the copy -> bytes that it writes so far, the same on all ranks; this tensor's are
            added.
    """
    mesh = shard.device_mesh
    copies = range(mesh.size() // mesh.size(-1))
    writer = min(copies, key=lambda copy: shares.get(copy, 0))
    shares[writer] = shares.get(writer, 0) + shard.numel() * shard.element_size()
    return sum(mesh.get_coordinate()[:-1]) == writer


def _fill(local: Tensor, first: int, part: Tensor, start: int) -> None:
    """Copy what two ranges of rows have in common: `local` begins with row `first`, `part` with `start`."""
    begin, stop = max(start, first), min(start + len(part), first + len(local))
    if begin < stop:
        local[begin - first : stop - first].copy_(part[begin - start : stop - start])


def _write_file(path: Path, tensors: Mapping[str, Rows]) -> tuple[Any, dict[str, list[int]]] | None:
    """Write this rank's rows; returns name, bytes and checksum of the file, offsets and sizes of parts."""
    if not tensors:
        return None
    held = {name: rows.contiguous() for name, (_, rows) in tensors.items()}
    parts = {
        name: [*[first, *[0] * (rows.ndim - 1)][: rows.ndim], *rows.shape]
        for name, (first, rows) in tensors.items()
    }
    try:
        write_safetensors(held, path)
        fsync(path)
        crc = _checksum_in_memory(path, held)
    except Exception as error:
        path.unlink(missing_ok=True)
        size = sum(rows.numel() * rows.element_size() for rows in held.values())
        if full := disk_full(error, path, size):
            raise full from error
        raise
    return (path.name, path.stat().st_size, crc), parts


def _checksum_in_memory(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 that a safetensors file of these tensors has; of the file only the header is read."""
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    crc = zlib.crc32(length + header)
    places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name in tensors}
    for name in sorted(places, key=places.__getitem__):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return crc
