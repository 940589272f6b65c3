"""Where training images are: named shards, each indexed as a whole without reading a pixel."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from pixio.data.randomness import digest, generator
from pixio.data.tar_index import Entry, index_tar
from pixio.images.decoding import DamagedDataError
from pixio.images.listing import IMAGE_SUFFIXES, is_junk, list_files

MAX_BYTES = 1 << 29  # of one encoded image; what is larger is no photograph

FOLDER_CHUNK = 256  # images of a folder that make one shard
SCENE_CHUNK, SCENE_CHUNKS = 256, 1024  # scenes in a shard, shards in an epoch
FIRST_SCENE = 1 << 62  # far from the seeds of written scene trees, so that held-out scenes stay held out


class OpenShard(NamedTuple):
    """An open shard: its index, and how to read one entry (encoded bytes, or uint8 pixels [H, W, 3])."""

    entries: Sequence[Entry]
    read: Callable[[Entry], bytes | np.ndarray]


class Shard(Protocol):
    """A named set of images that is indexed as a whole and read one by one."""

    name: str

    def open(self, epoch: int) -> AbstractContextManager[OpenShard]:
        """Index the shard for an epoch; it stays readable inside the context.

        Raises:
            DamagedDataError, OSError: the shard cannot be read.
        """


def is_url(location: str) -> bool:
    """Whether a location is fetched through webdataset (`pipe:…`, `https://…`) instead of opened."""
    return location.startswith("pipe:") or "://" in location


@dataclass(frozen=True)
class TarShard:
    """An uncompressed tar, on a local disk or behind a URL; its image members are read by their offset."""

    name: str
    location: str

    @contextmanager
    def open(self, epoch: int) -> Iterator[OpenShard]:
        with self._file() as file:
            descriptor = file.fileno()
            yield OpenShard(index_tar(file), lambda entry: _read_at(descriptor, entry.offset, entry.size))

    @contextmanager
    def _file(self) -> Iterator[BinaryIO]:
        if not is_url(self.location):
            with open(self.location, "rb") as file:
                yield file
            return
        import webdataset

        # an unlinked copy can be read at any offset, and is gone with the process whatever happens
        with tempfile.TemporaryFile() as file:
            with webdataset.gopen(self.location) as remote:
                shutil.copyfileobj(remote, file, 1 << 20)
            file.flush()
            yield file


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise DamagedDataError(f"{size} bytes is above {MAX_BYTES}")
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise DamagedDataError(f"{len(data)} bytes where the index promises {size}")
    return data


@dataclass(frozen=True)
class FolderShard:
    """A few hundred image files of a folder."""

    name: str
    root: str
    files: str  # relative paths joined by NUL: one object, so that worker processes share its memory

    @contextmanager
    def open(self, epoch: int) -> Iterator[OpenShard]:
        yield OpenShard([Entry(key) for key in self.files.split("\0")], self._read)

    def _read(self, entry: Entry) -> bytes:
        with open(os.path.join(self.root, entry.key), "rb") as file:
            return _read_at(file.fileno(), 0, os.fstat(file.fileno()).st_size)


@dataclass(frozen=True)
class SceneShard:
    """Rendered scenes, other ones in every epoch."""

    name: str
    index: int
    size: int

    @contextmanager
    def open(self, epoch: int) -> Iterator[OpenShard]:
        from pixio.synthetic.scenes import render

        first = FIRST_SCENE + (epoch * SCENE_CHUNKS + self.index) * SCENE_CHUNK
        entries = [Entry(str(seed)) for seed in range(first, first + SCENE_CHUNK)]
        yield OpenShard(entries, lambda entry: render(int(entry.key), self.size).image)


def _tars(data_path: str | None, what: str, search: Callable[[Path], list[str]]) -> list[Shard]:
    if data_path and (is_url(data_path) or data_path.endswith(".tar")):
        from webdataset.shardlists import expand_urls

        locations = expand_urls(data_path)
        for location in locations:
            if not is_url(location) and not os.path.isfile(location):
                raise FileNotFoundError(f"no tar {location} (from data_path {data_path})")
        return [TarShard(name, name if is_url(name) else os.path.abspath(name)) for name in locations]
    root = _folder(data_path)
    names = search(root)
    if not names:
        raise FileNotFoundError(f"no file {what} {root.absolute()}; check data_path")
    return [TarShard(name, os.path.abspath(root / name)) for name in names]


def _imagenet(data_path: str | None, size: int) -> list[Shard]:
    return _tars(
        data_path,
        "*train*.tar directly in",
        lambda root: sorted(path.name for path in root.glob("*train*.tar") if not is_junk(path.name)),
    )


def _web(data_path: str | None, size: int) -> list[Shard]:
    return _tars(data_path, "*.tar in or below", lambda root: list_files(root, (".tar",)))


def _images(data_path: str | None, size: int) -> list[Shard]:
    root = _folder(data_path)
    files = list_files(root)
    if not files:
        raise FileNotFoundError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in or below {root.absolute()}")
    # one fixed permutation mixes the classes, which lie folder by folder, into every shard
    files = [files[i] for i in generator("folder").permutation(len(files))]
    chunks = ["\0".join(files[i : i + FOLDER_CHUNK]) for i in range(0, len(files), FOLDER_CHUNK)]
    return [FolderShard(f"{i:06d}-{digest(chunk).hex()}", str(root), chunk) for i, chunk in enumerate(chunks)]


def _scenes(data_path: str | None, size: int) -> list[Shard]:
    return [SceneShard(f"scenes-{i:04d}", i, size) for i in range(SCENE_CHUNKS)]


def _folder(data_path: str | None) -> Path:
    if not data_path or not os.path.isdir(data_path):
        raise FileNotFoundError(f"data_path {data_path!r} is not a folder; it must hold the training images")
    return Path(data_path)


DATASET_TYPES = {"imagenet": _imagenet, "webdataset": _web, "folder": _images, "scenes": _scenes}


def find_shards(dataset_type: str, data_path: str | None, size: int) -> list[Shard]:
    """List the shards of a training set.

    Args:
        dataset_type: `imagenet`: tars `*train*.tar` directly in the folder; `webdataset`: all tars in it or
            below; `folder`: image files in it or below; `scenes`: rendered while training, endless.
        data_path: the folder; for tars also the path of one `.tar`, or URLs (`https://…`, `pipe:command`),
            both with braces as in `{000..127}.tar` and `::` between several. Ignored for `scenes`.
        size: side in pixels at which scenes are rendered.

    Returns:
        The shards, in the same order on every node.

    Raises:
        ValueError: unknown type.
        FileNotFoundError: nothing there; says what was looked for, and where.
    """
    if dataset_type not in DATASET_TYPES:
        raise ValueError(f"unknown dataset_type {dataset_type!r}; choose from {', '.join(DATASET_TYPES)}")
    return DATASET_TYPES[dataset_type](data_path, size)
