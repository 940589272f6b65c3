"""Endless streams of pre-training batches: curated, exactly resumable, and robust to damaged data.

Every random choice (order, acceptance, crop) is a pure function of (seed, pass, shard, entry), so the whole
state of a stream is where each consumer stands; every batch carries the position after it. What workers have
prefetched but the training loop has not taken is therefore read again after a resumption, never lost.

Guarantees, for as long as the data set and the seed stay the same:
* each image is visited by exactly one (rank, worker) in each pass;
* resumed with as many ranks and workers, the samples are those of the uninterrupted run, batch by batch;
* resumed with others, the passes in progress are completed: what had been visited is not visited again in
  the same pass, what had not been is, each image once. Only the order differs from the uninterrupted run.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pixio.data.shards import (
    Entry,
    Group,
    Past,
    Plan,
    Position,
    Shard,
    Source,
    TarShard,
    Unit,
    find_shards,
    generator,
    is_url,
    uniform,
)
from pixio.images import jpeg
from pixio.images.crops import crop_box, decode_crop, random_resized_crop
from pixio.images.decoding import DamagedDataError

logger = logging.getLogger(__name__)

MIN_READ = 200  # images before the share of errors means anything
MAX_CONSECUTIVE = 50  # failures in a row: the storage is gone, not an image
MAX_FRUITLESS = 256  # units without one sample before a set counts as empty
LOG_SECONDS = 60.0
MAX_ERRORS = 10_000  # different messages that a loader remembers


class DataError(RuntimeError):
    """The training data as a whole cannot be used; the run has to stop."""


# ------------------------------------------------------------------------------------------------ curation


def statistics_path(json_path: str, shard: TarShard) -> str | None:
    """Where the statistics of a tar lie; None for a URL without a parent folder and a name."""
    if is_url(shard.location):
        found = re.search(r"([^/\s]+)/([^/\s]+)\.tar\b", shard.location)
        if not found:
            return None
        folder, stem = found.groups()
    else:
        path = PurePath(shard.location)
        folder, stem = path.parent.name, path.stem
    return os.path.join(json_path, folder, f"{stem}.json")


def has_scores(record: Any, keys: Sequence[str]) -> bool:
    """Whether what the statistics hold for an image has a number under each key."""
    return isinstance(record, dict) and all(isinstance(record.get(key), int | float) for key in keys)


@dataclass(frozen=True)
class Curation:
    """Which images of a web-scale set are worth training on, by statistics computed beforehand.

    The statistics of a tar lie at `json_path/<parent folder>/<tar stem>.json` (or `<tar name>.json`): an
    object keyed by member name with `histogram_score`, `mae_loss`, `width` and `height`. A tar without its
    file, or a member that is not in it or has an `error` there, is skipped.

    Args:
        json_path: folder of the statistics.
        hist_thresh: drop images with histogram_score <= this (4.5 in the paper: text and flat graphics).
        imgres_thresh: drop images with a side below this, in pixels (320 in the paper).
        soft_sampling: keep an image, at each visit anew, with probability min(mae_loss, 1).
    """

    json_path: str
    hist_thresh: float | None = None
    imgres_thresh: int | None = None
    soft_sampling: bool = False

    def __post_init__(self) -> None:
        if not os.path.isdir(self.json_path):
            raise FileNotFoundError(f"json_path {self.json_path!r} is not a folder of curation statistics")

    def load(self, shard: TarShard) -> dict[str, Any] | None:
        """Read the statistics of a tar.

        Returns:
            Member name -> record, or None without a file.

        Raises:
            DamagedDataError: the file is not a JSON object.
            OSError: the file cannot be read.
        """
        path = statistics_path(self.json_path, shard)
        if path is None:
            return None
        file = next(filter(os.path.isfile, (path, path.removesuffix(".json") + ".tar.json")), None)
        if file is None:
            return None
        try:
            with open(file, "rb") as opened:
                records = json.load(opened)
        except (ValueError, RecursionError) as error:
            raise DamagedDataError(f"{file} is not readable JSON: {error}") from error
        if not isinstance(records, dict):
            raise DamagedDataError(f"{file} holds a JSON {type(records).__name__}, not an object of members")
        return records

    def rejects(self, record: Any, *key: int | str) -> str | None:
        """The reason to drop an image, or None to keep it; `key` seeds the draw of this visit."""
        if isinstance(record, dict) and "error" in record:
            return "damaged"
        needed = ["histogram_score"] * (self.hist_thresh is not None)
        needed += ["width", "height"] * (self.imgres_thresh is not None)
        needed += ["mae_loss"] * self.soft_sampling
        if not has_scores(record, needed):
            return "no_statistics"
        if self.hist_thresh is not None and not record["histogram_score"] > self.hist_thresh:
            return "histogram"
        if self.imgres_thresh is not None and min(record["width"], record["height"]) < self.imgres_thresh:
            return "resolution"
        if self.soft_sampling and not uniform("accept", *key) < record["mae_loss"]:
            return "sampled_out"
        return None


# ------------------------------------------------------------------------------------------------- reading


class _Place:
    """What a worker process is reading, in memory that outlives the process."""

    def __init__(self) -> None:
        self._pid = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._text = torch.zeros(1024, dtype=torch.uint8).share_memory_()

    @property
    def pid(self) -> int:
        return self._pid.item()

    def __str__(self) -> str:
        return self._text.numpy().tobytes().split(b"\0")[0].decode(errors="replace")

    def enter(self) -> None:
        """Note that this process is the one that reads."""
        self._pid[0] = os.getpid()

    def set(self, text: str) -> None:
        data = text.encode(errors="replace")[: len(self._text) - 1] + b"\0"
        self._text.numpy()[: len(data)] = np.frombuffer(data, np.uint8)


class _Tally:
    """What one consumer met since it started: counts, error messages, and the limits that stop the run.

    Counts: `seen` images = `kept` + `bad_image` + those dropped by `no_statistics`, `damaged`, `histogram`,
    `resolution` or `sampled_out`; beside them whole shards, as `bad_shard` and `shard_without_statistics`.
    """

    def __init__(self, error_budget: float, place: _Place) -> None:
        self.error_budget = error_budget
        self.place = place
        self.counts: Counter[str] = Counter()
        self.messages: list[str] = []
        self._reported: Counter[str] = Counter()
        self._last = deque(maxlen=5)
        self._consecutive = 0
        self._logged, self._unlogged = -LOG_SECONDS, 0
        self.start_search()

    def start_search(self) -> None:
        """Forget the fruitless units, because a sample was found."""
        self._fruitless: set[Unit] = set()
        self._fruitless_units = 0
        self._sampled_out = self.counts["sampled_out"]

    def keep(self) -> None:
        """Count a sample."""
        self.counts["kept"] += 1
        self._consecutive = 0
        self.start_search()

    def fail(self, kind: str, where: str, error: Exception) -> None:
        """Count something that cannot be read, log it at a bounded rate, and stop when it is too much."""
        message = f"{where}: {error}"
        self.counts[kind] += 1
        self._consecutive += 1
        self._last.append(message)
        self.messages.append(message)
        if time.monotonic() - self._logged >= LOG_SECONDS:
            more = f" (and {self._unlogged} more since the last line)" if self._unlogged else ""
            logger.warning("skipped %s%s", message, more)
            self._logged, self._unlogged = time.monotonic(), 0
        else:
            self._unlogged += 1

        errors = self.counts["bad_image"] + self.counts["bad_shard"]
        read = errors + self.counts["kept"]
        if self._consecutive >= MAX_CONSECUTIVE:
            self._stop(f"{self._consecutive} failures in a row")
        if read >= MIN_READ and errors > self.error_budget * read:
            self._stop(f"{errors} of {read} images failed, above the error budget {self.error_budget}")

    def _stop(self, why: str) -> None:
        last = "\n  ".join(self._last)
        raise DataError(f"the training data cannot be read: {why}; the last ones:\n  {last}")

    def end_fruitless(self, group: Group, plan: Plan) -> None:
        """Note a group that was read whole without one sample; stop when the plan's set has none.

        A consumer can be unlucky with what it is dealt. It stops when it has been through every unit for
        nothing and chance had no part in it, or through so many that the set may as well be empty.
        """
        met = [item for item in group.items if isinstance(item, Unit) and item.parts == plan.parts]
        self._fruitless.update(met)
        self._fruitless_units += len(met)
        everything = len(self._fruitless) == plan.shards * plan.parts
        certain = everything and self.counts["sampled_out"] == self._sampled_out
        if certain or self._fruitless_units >= MAX_FRUITLESS:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()) if count)
            last = "".join(f"\n  {message}" for message in self._last)
            raise DataError(
                f"the training set gives no image: {self._fruitless_units} shards or parts of them had none "
                f"to use ({counts}); check the data and its thresholds{last}"
            )

    def flush(self) -> dict[str, Any]:
        """Counts and messages since the last flush."""
        fresh = self.counts - self._reported
        self._reported = self.counts.copy()
        messages, self.messages = self.messages, []
        return {"counts": dict(fresh), "errors": messages}


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
        names = "\n".join(shard.name for shard in self.shards)
        digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]
        return {
            "seed": self.seed,
            "shuffle_shards": self.shuffle_shards,
            "shards": len(self.shards),
            "shard_names": digest,
        }

    def batches(self, plan: Plan, consumer: int, start: Position, place: _Place) -> Iterator[dict[str, Any]]:
        """Read as one consumer of a plan, from a position on, without end; `place` follows what is read.

        Yields:
            `images` uint8 [B, 3, S, S] in channels-last memory, `position` after them, `counts` and `errors`
            since the last batch.

        Raises:
            DataError: too many failures, or nothing to read.
        """
        tally = _Tally(self.error_budget, place)
        images, filled = None, 0
        for image, position in self._visits(plan, consumer, start, tally):
            if images is None:
                shape = (self.batch_size, 3, self.size, self.size)
                # the order in which pixels are decoded: transposing them would cost as much as resizing
                images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
            images[filled] = image
            filled += 1
            if filled == self.batch_size:
                yield {"images": images, "position": list(position), **tally.flush()}
                images, filled = None, 0

    def _visits(
        self, plan: Plan, consumer: int, start: Position, tally: _Tally
    ) -> Iterator[tuple[torch.Tensor, Position]]:
        """The crops of one consumer, each with the position after it."""
        number, begun, done = start
        while True:
            groups = plan.deal(number)[consumer]
            for i in range(begun, len(groups)):
                group, kept = groups[i], tally.counts["kept"]
                with ExitStack() as stack:
                    opened = self._open(group, number, stack, tally)
                    index = {shard: source.entries for shard, (source, _) in opened.items()}
                    entries = group.entries(lambda shard, index=index: index.get(shard, ()))
                    for at in range(done, len(entries)):
                        shard, entry = entries[at]
                        image = self._visit(number, shard, entry, *opened[shard], tally)
                        if image is not None:
                            yield image, (number, i, at + 1)
                if done == 0 and tally.counts["kept"] == kept:
                    tally.end_fruitless(group, plan)
                done = 0
            begun = 0
            number += 1

    def _open(
        self, group: Group, number: int, stack: ExitStack, tally: _Tally
    ) -> dict[int, tuple[Source, dict[str, Any] | None]]:
        """Index the shards of a group, with their statistics if curated, leaving out what cannot be read."""
        opened = {}
        for index in group.shards():
            shard, records = self.shards[index], None
            tally.place.set(shard.name)
            try:
                if self.curation:
                    records = self.curation.load(shard)
                    if records is None:
                        tally.counts["shard_without_statistics"] += 1
                        continue
                opened[index] = stack.enter_context(shard.open(number)), records
            except (DamagedDataError, OSError) as error:
                tally.fail("bad_shard", shard.name, error)
        return opened

    def _visit(
        self,
        number: int,
        index: int,
        entry: Entry,
        source: Source,
        records: dict[str, Any] | None,
        tally: _Tally,
    ) -> torch.Tensor | None:
        """One image of a pass: its crop, uint8 [3, S, S], or None if it is dropped."""
        tally.counts["seen"] += 1
        name = self.shards[index].name
        visit = (self.seed, number, name, entry.key)
        if self.curation and (reason := self.curation.rejects(records.get(entry.key), *visit)):
            tally.counts[reason] += 1
            return None
        where = f"{name}: {entry.key!r}"
        tally.place.set(where)
        rng = generator("crop", *visit)
        try:
            data = source.read(entry)
            if isinstance(data, bytes):
                box = partial(crop_box, rng, scale=self.crop_scale)
                crop = decode_crop(data, self.size, box, exact=self.decode == "exact")
            else:
                crop = random_resized_crop(Image.fromarray(data), rng, self.size, self.crop_scale)
        except (DamagedDataError, OSError) as error:
            tally.fail("bad_image", where, error)
            return None
        tally.keep()
        return crop


def open_stream(
    dataset_type: str,
    data_path: str | None,
    *,
    size: int,
    batch_size: int,
    seed: int = 0,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    json_path: str | None = None,
    hist_thresh: float | None = None,
    imgres_thresh: int | None = None,
    soft_sampling: bool = False,
    shuffle_shards: int = 8,
    error_budget: float = 0.2,
    decode: Literal["fast", "exact"] = "fast",
) -> Stream:
    """Describe a stream of training images; `Loader` reads it.

    Args:
        dataset_type, data_path: what to read, and where; see `find_shards`.
        json_path, hist_thresh, imgres_thresh, soft_sampling: curation of a `webdataset`; see `Curation`.
        size, batch_size, seed, crop_scale, shuffle_shards, error_budget, decode: see `Stream`.

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
    if decode == "fast" and jpeg.simplejpeg is None:
        warnings.warn(
            "simplejpeg is not installed, Pillow decodes JPEGs more slowly: pip install simplejpeg",
            stacklevel=2,
        )
    shards = find_shards(dataset_type, data_path, size)
    return Stream(shards, size, batch_size, seed, crop_scale, curation, shuffle_shards, error_budget, decode)


# ------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class _Feed(IterableDataset):
    """A rank's share of a stream; worker process w of the loader plays the w-th of the consumers."""

    stream: Stream
    plan: Plan
    consumers: list[tuple[int, Position, _Place]]  # number in the plan, start, what it reads

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        consumer, start, place = self.consumers[info.id if info else 0]
        place.enter()
        try:
            for batch in self.stream.batches(self.plan, consumer, start, place):
                yield {**batch, "consumer": consumer}
        except DataError as error:
            # raised by the loader, without the traceback of a process the reader does not know
            yield {"failure": str(error)}


class Loader:
    """The batches of one rank, without end, from worker processes; knows where it stands.

    Iterating again goes on where the last iteration stopped.

    Args:
        stream: what to read.
        rank, world_size: of this process.
        num_workers: worker processes; 0 reads in this one.
        pin_memory: give batches in pinned memory, for non-blocking transfer to an accelerator.
        prefetch: batches each worker keeps ready.
        state: to resume: the `state_dict()`s of ALL ranks of the interrupted run, in any order, whatever
            their number. Gather them over the ranks when saving a checkpoint, and save the list.

    Attributes:
        counts: images seen, kept and dropped, by reason, since this loader was made.
        errors: one message for each image or shard that could not be read, up to MAX_ERRORS.

    Raises:
        ValueError: the state is incomplete, or belongs to another data set or seed.
        DataError: while iterating: the data cannot be read, or a worker process died.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 4,
        state: list[dict[str, Any]] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..world_size - 1, found rank {rank} of {world_size}")
        self.stream = stream
        self.rank, self.world_size = rank, world_size
        self.num_workers, self.pin_memory, self.prefetch = num_workers, pin_memory, prefetch
        self.counts: Counter[str] = Counter()
        self._errors: dict[str, None] = {}  # in the order in which they were met

        self._readers = max(num_workers, 1)
        self._turn = 0  # reader that gives the next batch
        self._positions: list[Position] = [(0, 0, 0)] * self._readers
        past = self._resume(state) if state else None
        self._plan = Plan(
            len(stream.shards), world_size * self._readers, stream.seed, stream.shuffle_shards, past
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # DataLoader always begins with its worker 0, so that one plays the reader whose turn it is
        readers = [(self._turn + worker) % self._readers for worker in range(self._readers)]
        first = self.rank * self._readers
        places = [_Place() for _ in readers]
        consumers = [
            (first + reader, self._positions[reader], place)
            for reader, place in zip(readers, places, strict=True)
        ]
        loader = DataLoader(
            _Feed(self.stream, self._plan, consumers),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prefetch if self.num_workers else None,
            generator=torch.Generator(),  # else it would draw from, and so shift, the global one
        )
        with _deaths_met_by_the_reader():
            batches = iter(loader)
        while True:
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                dead = " and ".join(_find_dead(places))
                if not dead:
                    raise
                raise DataError(
                    f"a worker process died while it read {dead}: out of memory, /dev/shm too small for "
                    "the batches of all workers (fewer workers need less), or a fault in a decoder"
                ) from error
            if "failure" in batch:
                raise DataError(batch["failure"])
            reader = batch["consumer"] - first
            self._positions[reader] = tuple(batch["position"])
            self._turn = (reader + 1) % self._readers
            self.counts.update(batch["counts"])
            if len(self._errors) < MAX_ERRORS:
                self._errors.update(dict.fromkeys(batch["errors"]))
            yield {"images": batch["images"]}

    @property
    def errors(self) -> list[str]:
        """See above; nothing is named twice."""
        return list(self._errors)

    def report(self) -> dict[str, Any]:
        """What this rank met since the loader was made, `counts` and `errors`, as plain values."""
        return {"counts": dict(self.counts), "errors": self.errors}

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands after the last batch taken, in plain values; rank 0 adds what all share."""
        past = self._plan.past
        return {
            "stream": self.stream.identity(),
            "rank": self.rank,
            "world_size": self.world_size,
            "turn": self._turn,
            "positions": [list(position) for position in self._positions],
            "past": _past_to_plain(past) if self.rank == 0 and past else None,
        }

    def _resume(self, states: list[dict[str, Any]]) -> Past | None:
        """Take up the positions of an interrupted run; what its consumers leave, if they are not ours."""
        states = sorted(states, key=lambda state: state["rank"])
        ranks, world_size = [state["rank"] for state in states], states[0]["world_size"]
        if ranks != list(range(world_size)):
            raise ValueError(
                f"the loader's state must hold one entry for each of the {world_size} ranks that saved it, "
                f"found ranks {ranks}; gather state_dict() over all ranks before saving"
            )
        here = self.stream.identity()
        for there in (state["stream"] for state in states):
            changed = ", ".join(
                f"{key} {there[key]} -> {here[key]}" for key in here if there[key] != here[key]
            )
            if changed:
                raise ValueError(
                    f"the saved position belongs to another stream ({changed}); restore these settings, or "
                    "drop the loader's state to begin a new pass"
                )

        positions = [tuple(position) for state in states for position in state["positions"]]
        past = _past_from_plain(states[0]["past"], self.stream)
        first = min(number for number, _, _ in positions)
        if past and first > past.last:
            past = None
        readers = len(states[0]["positions"])
        if (world_size, readers) == (self.world_size, self._readers):
            self._turn = states[self.rank]["turn"]
            self._positions = positions[self.rank * readers : (self.rank + 1) * readers]
            return past
        self._positions = [(first, 0, 0)] * self._readers
        plan = Plan(
            len(self.stream.shards), len(positions), self.stream.seed, self.stream.shuffle_shards, past
        )
        return Past(plan, tuple(positions))


@contextmanager
def _deaths_met_by_the_reader() -> Iterator[None]:
    """Keep torch from raising a worker's death wherever the main thread is just then.

    It is noticed all the same, a few seconds later: when the next batch of that worker does not come.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _find_dead(places: Sequence[_Place]) -> list[str]:
    """What those worker processes were reading that are no more."""
    time.sleep(1)  # a dying process closes its connections a moment before it is gone
    alive = {os.getpid(), *(child.pid for child in multiprocessing.active_children())}
    return [str(place) for place in places if place.pid and place.pid not in alive]


def _past_to_plain(past: Past | None) -> dict[str, Any] | None:
    if past is None:
        return None
    return {
        "positions": [list(position) for position in past.positions],
        "past": _past_to_plain(past.plan.past),
    }


def _past_from_plain(plain: dict[str, Any] | None, stream: Stream) -> Past | None:
    if plain is None:
        return None
    positions = tuple(tuple(position) for position in plain["positions"])
    before = _past_from_plain(plain["past"], stream)
    return Past(
        Plan(len(stream.shards), len(positions), stream.seed, stream.shuffle_shards, before), positions
    )
