"""Shards, which hold images, and the plan: which consumer reads which of them, in what order.

A consumer is one worker process of one rank. A pass visits every image once. A shard is indexed without
reading a pixel; a unit is a shard, or one part of it where there are too few shards. The units of a pass are
shuffled and dealt to the consumers; a consumer takes its units in groups, and the entries of a group are
permuted together: a shuffle buffer that holds names instead of images. All of it is a pure function of the
seed, so that a position, (pass, group, entries done), says everything about where a consumer is.
"""

import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from pixio.images.decoding import DamagedDataError
from pixio.images.listing import IMAGE_SUFFIXES, is_junk, list_files

MAX_BYTES = 1 << 29  # of one encoded image; what is larger is no photograph

FOLDER_CHUNK = 256  # images of a folder that make one shard
SCENE_CHUNK, SCENE_CHUNKS = 256, 1024  # scenes in a shard, shards in a pass
FIRST_SCENE = 1 << 62  # far from the seeds of written scene trees, so that held-out scenes stay held out


# ---------------------------------------------------------------------------------------------- randomness


def _digest(*key: int | str) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()


def uniform(*key: int | str) -> float:
    """A number uniform in [0, 1) that is a pure function of the key."""
    return (int.from_bytes(_digest(*key)[:8], "little") >> 11) / (1 << 53)


def generator(*key: int | str) -> np.random.Generator:
    """A random generator that is a pure function of the key."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(*key), "little")))


# -------------------------------------------------------------------------------------------------- shards


class Entry(NamedTuple):
    """One image of a shard: its name, and where its bytes lie if the shard is a tar."""

    key: str
    offset: int = 0
    size: int = 0


class Source(NamedTuple):
    """An open shard: its index, and how to read one entry (encoded bytes, or uint8 pixels [H, W, 3])."""

    entries: Sequence[Entry]
    read: Callable[[Entry], bytes | np.ndarray]


class Shard(Protocol):
    """A named set of images that is indexed as a whole and read one by one."""

    name: str

    def open(self, number: int) -> AbstractContextManager[Source]:
        """Index the shard for pass `number`; it stays readable inside the context.

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
    def open(self, number: int) -> Iterator[Source]:
        with self._file() as file:
            descriptor = file.fileno()
            yield Source(_index(file), lambda entry: _read_at(descriptor, entry.offset, entry.size))

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


def _index(file: BinaryIO) -> list[Entry]:
    """Names and places of a tar's image members, from its headers alone.

    Only regular files count: links point elsewhere, and names are labels that are never opened.
    """
    entries, end = [], os.fstat(file.fileno()).st_size
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            last = -1
            for member in tar:
                if member.offset <= last or member.size < 0 or member.offset_data + member.size > end:
                    raise DamagedDataError(f"impossible header of member {member.name!r}")
                last = member.offset
                regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.sparse
                if regular and member.name.lower().endswith(IMAGE_SUFFIXES) and not is_junk(member.name):
                    entries.append(Entry(member.name, member.offset_data, member.size))
            # tarfile takes a broken header for the end of the archive; the true end is zeros, or nothing
            if any(os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)):
                raise DamagedDataError(f"broken header at byte {tar.offset}")
    except DamagedDataError:
        raise
    except MemoryError as error:  # tarfile reserves what a header says that a long name takes
        raise DamagedDataError("not a readable tar: a header claims an impossible size") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise DamagedDataError(f"not a readable tar: {error}") from error
    if not entries:
        raise DamagedDataError(f"no image member ({', '.join(IMAGE_SUFFIXES)})")
    return entries


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
    def open(self, number: int) -> Iterator[Source]:
        yield Source([Entry(key) for key in self.files.split("\0")], self._read)

    def _read(self, entry: Entry) -> bytes:
        with open(os.path.join(self.root, entry.key), "rb") as file:
            return _read_at(file.fileno(), 0, os.fstat(file.fileno()).st_size)


@dataclass(frozen=True)
class SceneShard:
    """Rendered scenes, other ones in every pass."""

    name: str
    index: int
    size: int

    @contextmanager
    def open(self, number: int) -> Iterator[Source]:
        from pixio.synthetic.scenes import render

        first = FIRST_SCENE + (number * SCENE_CHUNKS + self.index) * SCENE_CHUNK
        entries = [Entry(str(seed)) for seed in range(first, first + SCENE_CHUNK)]
        yield Source(entries, lambda entry: render(int(entry.key), self.size).image)


# --------------------------------------------------------------------------------------- where shards are


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
    return [
        FolderShard(f"{i:06d}-{_digest(chunk).hex()}", str(root), chunk) for i, chunk in enumerate(chunks)
    ]


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
        The shards, in the same order on every machine.

    Raises:
        ValueError: unknown type.
        FileNotFoundError: nothing there; says what was looked for, and where.
    """
    if dataset_type not in DATASET_TYPES:
        raise ValueError(f"unknown dataset_type {dataset_type!r}; choose from {', '.join(DATASET_TYPES)}")
    return DATASET_TYPES[dataset_type](data_path, size)


# ---------------------------------------------------------------------------------------- who reads what

Position = tuple[int, int, int]  # pass, groups of it that are done, entries done in the group under way


class Unit(NamedTuple):
    """Every `parts`-th entry of a shard, from entry `part` on."""

    shard: int
    part: int
    parts: int


class Rest(NamedTuple):
    """What an interrupted run left of a group that it had begun."""

    group: "Group"
    done: int


class Group(NamedTuple):
    """Units whose entries are permuted together; `key` seeds the permutation."""

    items: tuple[Unit | Rest, ...]
    key: tuple[int, ...]

    def shards(self) -> list[int]:
        """Indices of the shards that hold the entries, each once."""
        nested = ([item.shard] if isinstance(item, Unit) else item.group.shards() for item in self.items)
        return list(dict.fromkeys(shard for shards in nested for shard in shards))

    def entries(self, index: Callable[[int], Sequence[Entry]]) -> list[tuple[int, Entry]]:
        """The entries in the order in which they are visited, as (shard, entry); `index` lists a shard's."""
        found = []
        for item in self.items:
            if isinstance(item, Unit):
                found += [(item.shard, entry) for entry in index(item.shard)[item.part :: item.parts]]
            else:
                found += item.group.entries(index)[item.done :]
        return [found[i] for i in generator("order", *self.key).permutation(len(found))]


class Past(NamedTuple):
    """A run with other consumers that this one goes on from: its plan, and where each consumer stopped."""

    plan: "Plan"
    positions: tuple[Position, ...]

    @property
    def last(self) -> int:
        """The last pass that any consumer had begun, in this run or one that it went on from."""
        before = self.plan.past.last if self.plan.past else 0
        return max(before, *(number for number, _, _ in self.positions))

    def left(self, number: int) -> list[Unit | Rest]:
        """The part of a pass that no consumer had read."""
        rests: list[Unit | Rest] = []
        items: list[Unit | Rest] = []
        for groups, (now, group, done) in zip(self.plan.deal(number), self.positions, strict=True):
            if number > now:
                group, done = 0, 0
            elif number < now:
                group = len(groups)
            if done and group < len(groups):
                rests.append(Rest(groups[group], done))
                group += 1
            items += [item for later in groups[group:] for item in later.items]
        return rests + items


@dataclass(frozen=True)
class Plan:
    """Which consumer reads which entries of which pass.

    Args:
        shards: number of shards.
        consumers: number of consumers: ranks times workers per rank.
        seed: of every permutation.
        shuffle_shards: units whose entries are shuffled together.
        past: run with other consumers whose begun passes are finished first. Whatever it had read of a pass
            is not read again, whatever it had not is; the passes after those are dealt as if it had not been.
    """

    shards: int
    consumers: int
    seed: int
    shuffle_shards: int = 8
    past: Past | None = None

    @property
    def parts(self) -> int:
        """Units per shard: as few as give all consumers passes of equal length, to within a quarter."""
        parts = 1
        while self.shards * parts < 4 * self.consumers and self.shards * parts % self.consumers:
            parts += 1
        return parts

    def deal(self, number: int) -> list[list[Group]]:
        """The groups of pass `number`, a list for each consumer."""
        if self.past and number <= self.past.last:
            items = self.past.left(number)
        else:
            units = [
                Unit(shard, part, self.parts) for shard in range(self.shards) for part in range(self.parts)
            ]
            items = [units[i] for i in generator(self.seed, "units", number).permutation(len(units))]
        return [self._groups(items[c :: self.consumers], number, c) for c in range(self.consumers)]

    def _groups(self, items: list[Unit | Rest], number: int, consumer: int) -> list[Group]:
        # the rest of a group spans as many shards as a group does, so it makes a group of its own
        parts: list[list[Unit | Rest]] = [[item] for item in items if isinstance(item, Rest)]
        units = [item for item in items if isinstance(item, Unit)]
        parts += [units[i : i + self.shuffle_shards] for i in range(0, len(units), self.shuffle_shards)]
        return [Group(tuple(part), (self.seed, number, consumer, i)) for i, part in enumerate(parts)]
