"""Endless streams of pre-training crops: curated, and robust to damaged data.

Every random choice (order, acceptance, crop) is a pure function of (seed, epoch, shard, entry), so the whole
state of a stream is where each consumer stands; see `pixio.data.sampling`.
"""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from pixio.data.curation import Curation
from pixio.data.randomness import generator
from pixio.data.read_statistics import ReadStatistics
from pixio.data.sampling import Group, Position, Sampler
from pixio.data.shards import FolderShard, OpenShard, SceneShard, Shard, TarShard, find_shards, is_url
from pixio.data.tar_index import Entry
from pixio.data.worker_status import WorkerStatus
from pixio.images import jpeg
from pixio.images.crops import crop_box, decode_crop, random_resized_crop
from pixio.images.decoding import DamagedDataError


@dataclass(frozen=True)
class Stream:
    """The recipe of a stream: where its images are, and what becomes of them.

    Args:
        shards: the training set.
        size: side S of the crops, pixels.
        batch_size: crops per batch and rank.
        seed: of order, acceptance and crops.
        crop_scale: range of a crop's share of the image's area.
        curation: which images to train on; None for all.
        shuffle_shards: shards whose images are shuffled together.
        error_budget: share of failures among the images read that stops the run.
        decode: `fast`, or `exact` for the reference; see `decode_crop`.
    """

    shards: Sequence[Shard] = field(repr=False)
    size: int
    batch_size: int
    seed: int = 0
    crop_scale: tuple[float, float] = (0.2, 1.0)
    curation: Curation | None = None
    shuffle_shards: int = 8
    error_budget: float = 0.2
    decode: Literal["fast", "exact"] = "fast"

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("the training set holds no shard")
        if min(self.size, self.batch_size, self.shuffle_shards) < 1:
            found = f"{self.size}, {self.batch_size} and {self.shuffle_shards}"
            raise ValueError(f"size, batch_size and shuffle_shards must be positive, found {found}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must satisfy 0 < smallest <= largest <= 1, found {self.crop_scale}")

    def identity(self) -> dict[str, Any]:
        """What positions in this stream depend on, as plain values."""
        return {
            "seed": self.seed,
            "shuffle_shards": self.shuffle_shards,
            "shards": len(self.shards),
            "shard_names": self._shard_names,
        }

    @cached_property
    def _shard_names(self) -> str:
        """A short digest of the names; there may be a million, and a run asks for it at every step."""
        names = "\n".join(shard.name for shard in self.shards)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]

    def describe(self) -> str:
        """A line on what is read: the images of a folder, or of the first tar, counted by their endings."""
        first = self.shards[0]
        if isinstance(first, SceneShard):
            return "training set: rendered scenes, new ones in every epoch"
        if isinstance(first, FolderShard):
            files = [s.files.split("\0") for s in self.shards if isinstance(s, FolderShard)]
            return f"training set: {_count(list(chain(*files)))}"
        line = f"training set: {len(self.shards):,} tar{'s' * (len(self.shards) > 1)}"
        if isinstance(first, TarShard) and is_url(first.location):
            return line
        try:
            with first.open(0) as source:
                return f"{line}; the first holds {_count([entry.key for entry in source.entries])}"
        except (DamagedDataError, OSError) as error:
            return f"{line}; the first, {first.name}, cannot be read: {error}"

    def named_as_in(self, identity: dict[str, Any]) -> "Stream":
        """This stream with the names that its shards have in `identity`, if they are the same shards.

        Tars that were listed one by one used to be named by their location, absolute or relative.
        """
        for name in (lambda location: location, os.path.relpath):
            shards = [replace(s, name=name(s.location)) for s in self.shards if isinstance(s, TarShard)]
            if shards and (renamed := replace(self, shards=shards)).identity() == identity:
                return renamed
        return self


def _count(names: Sequence[str]) -> str:
    """Number of images, and of the four most frequent suffixes."""
    names = [os.path.basename(name) for name in names]
    endings = Counter(name[name.find(".") :].lower() for name in names)
    counts = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(4))
    return f"{len(names):,} images ({counts})"


def open_stream(
    dataset_type: str,
    data_path: str | None,
    *,
    size: int,
    image_suffix: str | None = None,
    json_path: str | None = None,
    hist_thresh: float | None = None,
    imgres_thresh: int | None = None,
    soft_sampling: bool = False,
    **options: Any,
) -> Stream:
    """Describe a stream of training images; `Loader` reads it.

    Args:
        dataset_type, data_path, image_suffix: what to read, and where; see `find_shards`.
        size: side S of the crops, pixels.
        json_path, hist_thresh, imgres_thresh, soft_sampling: curation of a `webdataset`; see `Curation`.
        options: the other settings of a `Stream`: `batch_size`, `seed`, `crop_scale`, …

    Raises:
        ValueError: unknown type, or settings that contradict each other.
        FileNotFoundError: no such data or statistics.
    """
    wanted = hist_thresh is not None or imgres_thresh is not None or soft_sampling
    if wanted and not json_path:
        raise ValueError("hist_thresh, imgres_thresh and soft_sampling need the statistics in json_path")
    if json_path and dataset_type != "webdataset":
        raise ValueError(f"json_path curates dataset_type webdataset only, found {dataset_type}")
    curation = Curation(json_path, hist_thresh, imgres_thresh, soft_sampling) if json_path else None
    if options.get("decode") != "exact" and jpeg.simplejpeg is None:
        warnings.warn(
            "simplejpeg is not installed, Pillow decodes JPEGs more slowly: pip install simplejpeg",
            stacklevel=2,
        )
    shards = find_shards(dataset_type, data_path, size, image_suffix)
    return Stream(shards, size, curation=curation, **options)


class StreamReader:
    """Reads a stream as one consumer of a sampler; `status` follows what is read."""

    def __init__(self, stream: Stream, sampler: Sampler, consumer: int, status: WorkerStatus) -> None:
        self.stream, self.sampler, self.consumer, self.status = stream, sampler, consumer, status
        self.statistics = ReadStatistics(stream.error_budget)

    def batches(self, start: Position) -> Iterator[dict[str, Any]]:
        """Read from a position on, without end.

        Yields:
            `images` uint8 [B, 3, S, S] in channels-last memory, `position` after them, `counts` and `errors`
            since the last batch.

        Raises:
            DataError: too many failures, or nothing to read.
        """
        images, filled = None, 0
        for image, position in self._crops(start):
            if images is None:
                shape = (self.stream.batch_size, 3, self.stream.size, self.stream.size)
                # the order in which pixels are decoded: transposing them would cost as much as resizing
                images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
            images[filled] = image
            filled += 1
            if filled == self.stream.batch_size:
                yield {"images": images, "position": list(position), **self.statistics.flush()}
                images, filled = None, 0

    def _crops(self, start: Position) -> Iterator[tuple[Tensor, Position]]:
        """The crops that are kept, each with the position after it."""
        epoch, begun, done = start
        counts = self.statistics.counts
        while True:
            groups = self.sampler.assign(epoch)[self.consumer]
            for i in range(begun, len(groups)):
                kept = counts["kept"]
                with ExitStack() as stack:
                    opened = self._open(groups[i], epoch, stack)
                    indexed: dict[int, Sequence[Entry]] = dict.fromkeys(groups[i].shards(), ())
                    indexed |= {shard: source.entries for shard, (source, _) in opened.items()}
                    entries = groups[i].entries(indexed.__getitem__)
                    for at in range(done, len(entries)):
                        shard, entry = entries[at]
                        crop = self._crop(epoch, shard, entry, *opened[shard])
                        if crop is not None:
                            yield crop, (epoch, i, at + 1)
                if done == 0 and counts["kept"] == kept:
                    had_entries = bool(entries) or len(opened) < len(groups[i].shards())
                    self.statistics.end_empty(groups[i], self.sampler, had_entries)
                done = 0
            begun = 0
            epoch += 1

    def _open(
        self, group: Group, epoch: int, stack: ExitStack
    ) -> dict[int, tuple[OpenShard, dict[str, Any] | None]]:
        """Index the shards of a group, with their curation statistics, leaving out what cannot be read."""
        opened = {}
        for index in group.shards():
            shard, records = self.stream.shards[index], None
            self.status.set(shard.name)
            try:
                if self.stream.curation:
                    assert isinstance(shard, TarShard)  # others have no statistics
                    records = self.stream.curation.load(shard)
                    if records is None:
                        self.statistics.counts["shard_without_statistics"] += 1
                        continue
                source = stack.enter_context(shard.open(epoch))
                opened[index] = source, records
                if source.damage:
                    self.statistics.fail("incomplete_shard", shard.name, source.damage)
            except (DamagedDataError, OSError) as error:
                self.statistics.fail("bad_shard", shard.name, error)
        return opened

    def _crop(
        self, epoch: int, shard: int, entry: Entry, source: OpenShard, records: dict[str, Any] | None
    ) -> Tensor | None:
        """The crop of one image in an epoch, uint8 [3, S, S], or None if it is dropped."""
        stream, counts = self.stream, self.statistics.counts
        counts["seen"] += 1
        name = stream.shards[shard].name
        visit = (stream.seed, epoch, name, entry.key)
        reason = None
        if stream.curation and records is not None:
            reason = stream.curation.rejects(records.get(entry.key), *visit)
        if reason:
            counts[reason] += 1
            return None
        where = f"{name}: {entry.key!r}"
        self.status.set(where)
        rng = generator("crop", *visit)
        try:
            data = source.read(entry)
            if isinstance(data, bytes):
                box = partial(crop_box, rng, scale=stream.crop_scale)
                crop = decode_crop(data, stream.size, box, exact=stream.decode == "exact")
            else:
                crop = random_resized_crop(Image.fromarray(data), rng, stream.size, stream.crop_scale)
        except (DamagedDataError, OSError) as error:
            self.statistics.fail("bad_image", where, error)
            return None
        self.statistics.keep()
        return crop
