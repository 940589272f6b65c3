"""Where training images are: named shards, each indexed as a whole without reading a pixel."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from pixio.data.randomness import digest, generator
from pixio.data.tar_index import Entry, index_tar, read_member
from pixio.images.listing import IMAGE_SUFFIXES, is_junk, list_files

FETCHES = 3  # times a shard behind a URL is tried
FOLDER_CHUNK = 256  # images of a folder that make one shard
SCENE_CHUNK, SCENE_CHUNKS = 256, 1024  # scenes in a shard, shards in an epoch
FIRST_SCENE = 1 << 62  # far from the seeds of written scene trees, so that held-out scenes stay held out


class OpenShard(NamedTuple):
    """An open shard: its index, and how to read one entry (encoded bytes, or uint8 pixels [H, W, 3]).

    `damage` says what else it held and has lost, or only links to; empty if nothing.
    """

    entries: Sequence[Entry]
    read: Callable[[Entry], Any]
    damage: str = ""


class Shard(Protocol):
    """A named set of images that is indexed as a whole and read one by one."""

    @property
    def name(self) -> str:
        """The same wherever the set lies: it seeds crops, and positions in the set refer to it."""

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
    """An uncompressed tar, on a local disk or behind a URL; its image members are read by their offset.

    Attributes:
        name: the same wherever the set lies: it seeds crops, and positions in the set refer to it.
        location: absolute path, or URL.
        suffixes: of the members that are images to read.
    """

    name: str
    location: str
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES

    @contextmanager
    def open(self, epoch: int) -> Iterator[OpenShard]:
        with self._file() as file:
            index, descriptor = index_tar(file, self.suffixes), file.fileno()

            def read(entry: Entry) -> bytes:
                return read_member(descriptor, entry, index.extents.get(entry.offset))

            yield OpenShard(index.entries, read, index.damage)

    @contextmanager
    def _file(self) -> Iterator[BinaryIO]:
        if not is_url(self.location):
            with open(self.location, "rb") as file:
                yield file
            return
        # an unlinked copy can be read at any offset, and is gone with the process whatever happens
        with tempfile.TemporaryFile() as file:
            self._fetch(file)
            yield file

    def _fetch(self, file: BinaryIO) -> None:
        """Copy what is behind the URL, if need be in several tries.

        A scheduler that asks a run to stop also signals the command that fetches, and the run's last step,
        which is saved, must not lack the images of this shard.
        """
        import webdataset

        for left in reversed(range(FETCHES)):
            file.seek(0)
            file.truncate()
            try:
                with webdataset.gopen(self.location) as remote:
                    shutil.copyfileobj(remote, file, 1 << 20)
                file.flush()
                return
            except OSError as error:
                if not left or error.errno is not None:  # not the command: a full disk, for example
                    raise


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
            return read_member(file.fileno(), entry._replace(size=os.fstat(file.fileno()).st_size))


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


def _tars(data_path: str | None, suffixes: tuple[str, ...], what: str, search: Callable) -> list[Shard]:
    if data_path and (is_url(data_path) or data_path.endswith(".tar")):
        from webdataset.shardlists import expand_urls

        given = expand_urls(data_path)
        for location in given:
            if not is_url(location) and not os.path.isfile(location):
                raise FileNotFoundError(f"no tar {os.path.abspath(location)} (from data_path {data_path})")
        locations = [name if is_url(name) else os.path.abspath(name) for name in given]
        names = _portable_names(locations)
        return [TarShard(name, place, suffixes) for name, place in zip(names, locations, strict=True)]
    root = _folder(data_path)
    names = search(root)
    if not names:
        raise FileNotFoundError(f"no file {what} {root.absolute()}; check data_path{_hint(root)}")
    return [TarShard(name, os.path.abspath(root / name), suffixes) for name in names]


def _portable_names(locations: Sequence[str]) -> list[str]:
    """Names that stay when all tars are moved together: their paths below the folder they share."""
    split = [[location] if location.startswith("pipe:") else location.split("/") for location in locations]
    levels = zip_longest(*(parts[:-1] for parts in split))
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))
    return ["/".join(parts[shared:]) for parts in split]


def _hint(root: Path) -> str:
    """What a folder holds instead of what was sought, and what to do with it; empty if nothing is known."""
    kinds = {
        "images: use --dataset_type folder": IMAGE_SUFFIXES,
        "tars: use --dataset_type webdataset": (".tar",),
        "compressed tars, whose images cannot be read by their place: unpack each once, e.g. "
        "`for f in *.gz; do gunzip $f; done`": (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"),
        "parquet files: write their images as files once, e.g. with the `datasets` library: `for i, row in "
        "enumerate(load_dataset('parquet', data_files='*.parquet', split='train')): "
        "row['image'].save(f'images/{i:08d}.png')`, and use --dataset_type folder": (".parquet",),
    }
    for kind, suffixes in kinds.items():
        if found := list_files(root, suffixes):
            return f". It holds {len(found):,} {kind} ({found[0]}, …)"
    return ""


def _imagenet(data_path: str | None, size: int, suffixes: tuple[str, ...]) -> list[Shard]:
    def search(root: Path) -> list[str]:
        return sorted(path.name for path in root.glob("*train*.tar") if not is_junk(path.name))

    return _tars(data_path, suffixes, "*train*.tar directly in", search)


def _web(data_path: str | None, size: int, suffixes: tuple[str, ...]) -> list[Shard]:
    return _tars(data_path, suffixes, "*.tar in or below", lambda root: list_files(root, (".tar",)))


def _images(data_path: str | None, size: int, suffixes: tuple[str, ...]) -> list[Shard]:
    root = _folder(data_path)
    files = list_files(root, suffixes)
    if not files:
        found = f"no image ({', '.join(suffixes)}) in or below {root.absolute()}"
        raise FileNotFoundError(f"{found}; check data_path{_hint(root)}")
    # one fixed permutation mixes the classes, which lie folder by folder, into every shard
    files = [files[i] for i in generator("folder").permutation(len(files))]
    chunks = ["\0".join(files[i : i + FOLDER_CHUNK]) for i in range(0, len(files), FOLDER_CHUNK)]
    return [FolderShard(f"{i:06d}-{digest(chunk).hex()}", str(root), chunk) for i, chunk in enumerate(chunks)]


def _scenes(data_path: str | None, size: int, suffixes: tuple[str, ...]) -> list[Shard]:
    return [SceneShard(f"scenes-{i:04d}", i, size) for i in range(SCENE_CHUNKS)]


def _folder(data_path: str | None) -> Path:
    if data_path and os.path.isfile(data_path):
        hint = _hint(Path(data_path).parent)
        raise FileNotFoundError(
            f"data_path {os.path.abspath(data_path)} is neither a folder nor a plain .tar{hint}"
        )
    if not data_path:
        raise FileNotFoundError(
            "no training images: name their folder with --data_path (scripts: IMAGENET_TARS)"
        )
    if not os.path.isdir(data_path):
        place = os.path.abspath(data_path)
        raise FileNotFoundError(f"data_path {place} is not a folder; it must hold the training images")
    return Path(data_path)


DATASET_TYPES = {"imagenet": _imagenet, "webdataset": _web, "folder": _images, "scenes": _scenes}


def find_shards(
    dataset_type: str, data_path: str | None, size: int, image_suffix: str | None = None
) -> list[Shard]:
    """List the shards of a training set.

    Args:
        dataset_type: `imagenet`: tars `*train*.tar` directly in the folder; `webdataset`: all tars in it or
            below; `folder`: image files in it or below; `scenes`: rendered while training, endless.
        data_path: the folder; for tars also the path of one `.tar`, or URLs (`https://…`, `pipe:command`),
            both with braces as in `{000..127}.tar` and `::` between several. Ignored for `scenes`.
        size: side in pixels at which scenes are rendered.
        image_suffix: ending of the names to read, such as `.jpg` of tars that hold KEY.jpg with KEY.seg.png;
            None = every image (`IMAGE_SUFFIXES`).

    Returns:
        The shards, in the same order on every node.

    Raises:
        ValueError: unknown type.
        FileNotFoundError: nothing there; says what was looked for, and where.
    """
    if dataset_type not in DATASET_TYPES:
        raise ValueError(f"unknown dataset_type {dataset_type!r}; choose from {', '.join(DATASET_TYPES)}")
    suffixes = (image_suffix.lower(),) if image_suffix else IMAGE_SUFFIXES
    return DATASET_TYPES[dataset_type](data_path, size, suffixes)
