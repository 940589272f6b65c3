"""Features of many images: found, read by worker processes, and encoded in batches of one input size.

The images of all shards are cut into parts. Batches never reach over a part: the features depend neither on
how often a run was interrupted nor on the number of ranks that share it.

Letters: B images of one batch, L blocks, C class tokens, h x w patches, D width.
"""

import glob
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pixio.data.loader import SHARED_MEMORY
from pixio.data.shards import FOLDER_CHUNK, FolderShard, Shard, TarShard
from pixio.engine.runtime import Runtime
from pixio.images.crops import resize_center_crop
from pixio.images.decoding import DamagedDataError, decode
from pixio.images.inference import Transform
from pixio.images.listing import IMAGE_SUFFIXES, is_junk, list_files
from pixio.images.normalization import normalize

ARRAYS = ("patch_tokens", "embedding", "cls_tokens", "mean_patch")
Arrays = dict[str, Tensor]
_SHARED_BYTES = 2**30  # of shared memory, enough for what workers hold ready


# ---------------------------------------------------------------------------------------- what is computed
class FeatureSpec(Protocol):
    """What is computed from each image."""

    @property
    def remedy(self) -> str:
        """The advice where features are not finite."""

    def pixels(self, data: bytes) -> tuple[Tensor, tuple[int, int]]:
        """The encoder's input, uint8 [3, H, W], of an encoded image, and the image's (height, width)."""

    def compute(self, encoder: nn.Module, images: Tensor) -> Arrays:
        """The arrays of images uint8 [B, 3, H, W], each with B as its first axis; runs under autocast."""


@dataclass(frozen=True)
class TokenFeatures:
    """Tokens of a Pixio encoder and their means, as `pixio features` stores them.

    Attributes:
        transform: how an image becomes the encoder's input.
        arrays: some of `ARRAYS`: the map of patch tokens [h, w, D], the mean class token [D] (the recommended
            global embedding), all class tokens [C, D], and the mean patch token [D].
        block_ids: the L blocks, which then are the first axis of every array; None = the last block, and no
            such axis.
        norm: after the encoder's final norm, or as the tokens leave the block.
        half: stored as float16 instead of float32.
    """

    transform: Transform
    arrays: tuple[str, ...] = ("patch_tokens", "embedding")
    block_ids: tuple[int, ...] | None = None
    norm: bool = True
    half: bool = False

    @property
    def remedy(self) -> str:
        return "store float32" if self.half else "compute in fp32"

    def pixels(self, data: bytes) -> tuple[Tensor, tuple[int, int]]:
        pixels, placement = self.transform.pixels(data)
        return pixels, placement.original

    def compute(self, encoder: nn.Module, images: Tensor) -> Arrays:
        outputs = encoder(normalize(images), (-1,) if self.block_ids is None else self.block_ids)
        kind = "_norm" if self.norm else ""
        patches = torch.stack([output[f"patch_tokens{kind}"] for output in outputs], dim=1).float()
        tokens = torch.stack([output[f"cls_tokens{kind}"] for output in outputs], dim=1).float()
        grid = encoder.grid_of(*images.shape[-2:])
        make = {
            "patch_tokens": lambda: patches.unflatten(2, grid),  # [B, L, h, w, D]
            "embedding": lambda: tokens.mean(2),  # [B, L, D]
            "cls_tokens": lambda: tokens,  # [B, L, C, D]
            "mean_patch": lambda: patches.mean(2),  # [B, L, D]
        }
        arrays = {name: make[name]() for name in self.arrays}
        if self.block_ids is None:
            arrays = {name: array[:, 0] for name, array in arrays.items()}
        return {name: array.half() if self.half else array for name, array in arrays.items()}


@dataclass(frozen=True)
class CenterCropped:
    """Base of specifications that see the central square of an image.

    Attributes:
        resize: shorter side after resizing, in pixels.
        crop: side of the square, in pixels.
    """

    resize: int
    crop: int

    def pixels(self, data: bytes) -> tuple[Tensor, tuple[int, int]]:
        image = decode(data)
        return resize_center_crop(image, self.resize, self.crop), (image.height, image.width)


# ---------------------------------------------------------------------------------------- where images are
def find_images(sources: Sequence[str], chunk: int = FOLDER_CHUNK) -> list[Shard]:
    """List the images that files, folders, tars and patterns such as `photos/**/*.jpg` stand for.

    Args:
        sources: a folder stands for the images and tars in and below it, sorted. What is named several
            times is read once; images come before tars.
        chunk: images outside of tars that make one shard.

    Raises:
        FileNotFoundError: a source that stands for nothing.
    """
    files: dict[str, None] = {}  # in the order in which they are found
    tars: dict[str, None] = {}
    for source in sources:
        found = [source] if Path(source).exists() else _match(source)
        if not found:
            raise FileNotFoundError(f"no file or folder {Path(source).absolute()}")
        inside = [file for path in found for file in _files(str(Path(path)))]
        images = [file for file in inside if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]
        archives = [file for file in inside if os.path.splitext(file)[1].lower() == ".tar"]
        if not images and not archives:
            place = Path(source).absolute()
            raise FileNotFoundError(f"no image ({', '.join(IMAGE_SUFFIXES)}) and no .tar in {place}")
        files |= dict.fromkeys(images)
        tars |= dict.fromkeys(archives)
    return folder_shards("", "", list(files), chunk) + [TarShard(tar, tar) for tar in tars]


def _match(pattern: str) -> list[str]:
    """What a pattern stands for, sorted, without what the rule of folders leaves out below its fixed part."""
    fixed = re.split(r"[*?[]", pattern)[0].rpartition("/")[0] or "."
    return sorted(
        path for path in glob.glob(pattern, recursive=True) if not is_junk(os.path.relpath(path, fixed))
    )


def _files(path: str) -> list[str]:
    """A file itself, or those in and below a folder, sorted; folders may be called as images are."""
    if not os.path.isdir(path):
        return [path]
    names = list_files(path, (*IMAGE_SUFFIXES, ".tar"))
    names.sort(key=lambda name: name.replace(os.sep, "\0"))  # folder by folder, as paths are sorted
    prefix = "" if path == os.curdir else os.path.join(path, "")
    return [prefix + name for name in names]


def folder_shards(name: str, root: str, files: Sequence[str], chunk: int) -> list[Shard]:
    """Shards of at most `chunk` of the `files` below `root`, which keep their order."""
    return [FolderShard(name, root, "\0".join(files[i : i + chunk])) for i in range(0, len(files), chunk)]


class ShardRange(NamedTuple):
    """The entries of a shard from `start` to before `stop`."""

    shard: int
    start: int
    stop: int

    def split(self, size: int) -> "list[ShardRange]":
        """The range in pieces of at most `size` entries."""
        return [
            self._replace(start=i, stop=min(i + size, self.stop)) for i in range(self.start, self.stop, size)
        ]


class ShardIndex(NamedTuple):
    """The parts of all shards, a line on each unreadable shard, and a digest of all names and sizes."""

    parts: list[ShardRange]
    damaged: list[str]
    digest: str


def index_shards(shards: Sequence[Shard], size: int, skip_damaged: bool = False) -> ShardIndex:
    """Cut shards into parts of at most `size` images each; tars are indexed for it.

    Raises:
        ValueError: a tar that cannot be read, unless `skip_damaged`.
    """
    parts, damaged, digest = [], [], hashlib.sha256()
    for number, shard in enumerate(shards):
        entries = []
        try:
            with shard.open(0) as source:
                entries = [tuple(entry) for entry in source.entries]
                if source.damage:
                    damaged.append(f"{shard.name}: {source.damage}")
                    warnings.warn(damaged[-1], stacklevel=2)
        except DamagedDataError as error:
            damaged.append(f"{shard.name}: {error}")
            if not skip_damaged:
                raise DamagedDataError(damaged[-1]) from error
        parts += ShardRange(number, 0, len(entries)).split(size)
        digest.update(f"{shard.name} {entries}\n".encode(errors="surrogateescape"))
    return ShardIndex(parts, damaged, digest.hexdigest())


# ------------------------------------------------------------------------------------------------- reading
class ImageRecord(NamedTuple):
    """An image that was read: its name, its size (height, width) in pixels, or why it cannot be read."""

    name: str
    size: tuple[int, int] | None
    error: str | None = None


class _Piece(NamedTuple):
    """What a worker process made of a piece of a part."""

    images: list[ImageRecord]
    # Entries of one input size, and their uint8 [B, 3, H, W]
    batches: list[tuple[list[int], Tensor]] | list[tuple[list[int], np.ndarray]]


class _Pieces(Dataset):
    """Reads pieces of parts; each process keeps the shard open that it reads."""

    def __init__(self, shards: Sequence[Shard], pieces: Sequence[ShardRange], spec: FeatureSpec):
        self.shards, self.pieces, self.spec = shards, pieces, spec
        # Tensors of workers lie in shared memory, of which containers have 64 MB; arrays go through pipes.
        self.through_pipes = (
            os.path.isdir(SHARED_MEMORY) and shutil.disk_usage(SHARED_MEMORY).free < _SHARED_BYTES
        )
        self._opened: int | None = None
        self._stack = ExitStack()

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> _Piece:
        shard, start, stop = self.pieces[number]
        if self._opened != shard:
            self._stack.close()
            self._source = self._stack.enter_context(self.shards[shard].open(0))
            self._opened = shard
        prefix = self.shards[shard].name and f"{self.shards[shard].name}/"
        images: list[ImageRecord] = []
        groups: dict[torch.Size, tuple[list[int], list[Tensor]]] = {}
        for place, entry in enumerate(self._source.entries[start:stop], start):
            # what is not UTF-8 is escaped: no file format and few terminals take it
            name = os.fsencode(f"{prefix}{entry.key}").decode(errors="backslashreplace")
            try:
                pixels, size = self.spec.pixels(self._source.read(entry))
            except (DamagedDataError, OSError) as error:
                images.append(ImageRecord(name, None, str(error)))
                continue
            images.append(ImageRecord(name, size))
            numbers, group = groups.setdefault(pixels.shape, ([], []))
            numbers.append(place)
            group.append(pixels)
        batches = [(numbers, torch.stack(group)) for numbers, group in groups.values()]
        if self.through_pipes:
            batches = [(numbers, pixels.numpy()) for numbers, pixels in batches]
        return _Piece(images, batches)


class FeatureExtractor:
    """Encodes parts of shards one after another.

    Args:
        encoder: in evaluation mode, on the device of `runtime`.
        spec: what is computed.
        runtime: device and precision.
        batch_size: images per batch at most; all images of a batch have the same input size.
        workers: processes that read; 0 reads in this one.

    Raises:
        ValueError: an impossible batch size or number of workers.
    """

    def __init__(
        self, encoder: nn.Module, spec: FeatureSpec, runtime: Runtime, batch_size: int = 32, workers: int = 0
    ):
        if batch_size < 1 or workers < 0:
            raise ValueError(
                f"batch_size must be at least 1 and workers at least 0, found {batch_size} and {workers}"
            )
        self.encoder, self.spec, self.runtime = encoder, spec, runtime
        self.batch_size, self.workers = batch_size, workers

    def run(
        self,
        shards: Sequence[Shard],
        parts: Sequence[ShardRange],
        progress: Callable[[int], object] = lambda images: None,
    ) -> Iterator[tuple[list[ImageRecord], dict[int, Arrays]]]:
        """Encode parts one after another.

        Args:
            shards: the images.
            parts: of the shards, in this order.
            progress: called with the number of images of every batch that is done.

        Yields:
            For each part a record of every image, and by their place in the part the arrays of those that
            could be read.

        Raises:
            ValueError: features that are not finite; the message names the image.
        """
        if not parts:  # no worker needs to be started
            return
        pieces = [part.split(self.batch_size) for part in parts]
        loader = DataLoader(
            _Pieces(shards, list(chain(*pieces)), self.spec),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.runtime.pins_memory,
        )
        read = iter(loader)
        for part, pieces_of_part in zip(parts, pieces, strict=True):
            images: list[ImageRecord] = []
            arrays: dict[int, Arrays] = {}
            waiting: dict[torch.Size, tuple[list[int], Tensor]] = {}
            for _ in pieces_of_part:
                piece = next(read)
                images += piece.images
                for numbers, pixels in piece.batches:
                    pixels = torch.as_tensor(pixels)
                    if held := waiting.pop(pixels.shape[1:], None):
                        numbers, pixels = held[0] + numbers, torch.cat([held[1], pixels])
                    whole = len(numbers) // self.batch_size * self.batch_size
                    arrays |= self._encode(numbers[:whole], pixels[:whole])
                    if numbers[whole:]:
                        waiting[pixels.shape[1:]] = numbers[whole:], pixels[whole:]
                progress(len(piece.images))
            for numbers, pixels in waiting.values():
                arrays |= self._encode(numbers, pixels)
            arrays = {number - part.start: found for number, found in sorted(arrays.items())}
            for number, found in arrays.items():
                if not all(array.isfinite().all() for array in found.values()):
                    raise ValueError(
                        f"the features of {images[number].name} are not finite: {self.spec.remedy}"
                    )
            yield images, arrays

    @torch.inference_mode()
    def _encode(self, numbers: list[int], pixels: Tensor) -> dict[int, Arrays]:
        """Arrays of each of some images of one size, uint8 [n, 3, H, W], under their numbers."""
        found = {}
        for i in range(0, len(numbers), self.batch_size):
            images = pixels[i : i + self.batch_size].to(self.runtime.device, non_blocking=True)
            with self.runtime.autocast():
                batch = self.spec.compute(self.encoder, images)
            batch = {name: array.cpu() for name, array in batch.items()}
            for row, number in enumerate(numbers[i : i + self.batch_size]):
                found[number] = {name: array[row] for name, array in batch.items()}
        return found
