"""Teacher tokens of un-augmented images, computed once and mapped from disk: distillation on small machines.

Not the published recipe: there teacher and students see a new random crop at every visit; from a cache they
see the same central square each time, so that the students learn less from the same images and overfit
sooner.

A cache is a folder: `images.bin`, uint8 [n, 3, S, S]; `tokens.bin`, bfloat16 [n, C + N, D], class tokens
first; and `cache.json`, written last, which says what they were made of, and what could not be read. Letters:
n images, S side in pixels, C class tokens, N patches of the students' grid, D teacher width, B images of a
batch.
"""

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from teachers import teacher_tokens
from torch import Tensor, nn
from tqdm import tqdm

from pixio.data import Stream
from pixio.data.shards import SceneShard, Shard, generator
from pixio.engine.runtime import GIB, Runtime
from pixio.files import write_atomic
from pixio.images.crops import resize_center_crop
from pixio.images.decoding import DamagedDataError, decode
from pixio.images.normalization import normalize

NEWS_SECONDS = 60.0  # between signs of life of the rank that writes: no collective may take hours


class Cache(NamedTuple):
    """Images uint8 [n, 3, S, S], their tokens bfloat16 [n, C + N, D], and a line on each thing left out."""

    images: Tensor
    tokens: Tensor
    failed: Sequence[str] = ()


class CachedBatches:
    """Batches of one rank from a cache, without end: those of `pixio.data.Loader`, with `tokens`.

    A pass visits every image once, in an order that is a pure function of the seed and the pass. The images
    that all ranks have seen tell where it stands, so nothing else needs saving.

    Args:
        cache: from `open_cache`.
        stream: its batch size B, per rank, and its seed.
        rank, world_size: of this process.
        seen: images that all ranks have seen.

    Attributes:
        counts: images seen and kept, which here are the same, since this object was made.
    """

    def __init__(self, cache: Cache, stream: Stream, rank: int, world_size: int, seen: int) -> None:
        self.cache, self.stream = cache, stream
        self.rank, self.world_size, self.seen = rank, world_size, seen
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        n, size, number, order = len(self.cache.images), self.stream.batch_size, -1, []
        while True:
            rows = []
            first = self.seen + self.rank * size
            for visit in range(first, first + size):
                if visit // n != number:
                    number = visit // n
                    order = generator(self.stream.seed, "cache", number).permutation(n).tolist()
                rows.append(order[visit % n])
            self.seen += size * self.world_size
            self.counts.update(seen=size, kept=size)
            yield {"images": self.cache.images[rows], "tokens": self.cache.tokens[rows]}

    def state_dict(self) -> None:
        """Nothing: the run counts the images."""

    def report(self) -> dict[str, Any]:
        """As `pixio.data.Loader.report`; what the cache leaves out is named by rank 0."""
        return {"counts": dict(self.counts), "errors": list(self.cache.failed) if self.rank == 0 else []}


def open_cache(
    folder: Path, stream: Stream, teacher: nn.Module, grid: tuple[int, int], runtime: Runtime
) -> Cache:
    """Map the cache of a training set, which rank 0 writes first if `folder` has none; a collective.

    Args:
        folder: made when missing, on a disk that all ranks see.
        stream: its images; the shorter side is resized to its size S, and the central square kept.
        teacher: from `load_teacher`, whole on rank 0.
        grid: of the students, in patches.
        runtime: the ranks.

    Returns:
        Images and tokens, which are read from the disk where indexed. Images and tars that cannot be read are
        left out, and named.

    Raises:
        ValueError: the folder holds another cache or a damaged one, the disk is too small, or the set is
            curated, has no end or no readable image.
    """
    if stream.curation or isinstance(stream.shards[0], SceneShard):
        raise ValueError(
            "--feature_cache needs a fixed set of images: curation draws anew at every visit, and scenes "
            "never end (write some with `pixio scenes`, and read them with --dataset_type folder)"
        )
    news = _News(runtime)
    if runtime.is_main:
        failure = ""
        try:
            entries, data = _list(stream.shards, news.working)
            made_of = {
                "teacher": teacher.fingerprint,
                "precision": str(runtime.dtype),
                "data": data,
                "size": stream.size,
                "grid": list(grid),
            }
            if (folder / "cache.json").is_file():
                _check(folder, made_of)
            else:
                _write(folder, made_of, entries, stream, teacher, grid, runtime, news.working)
        except (ValueError, OSError) as error:
            failure = str(error)
        news.done(failure)
    else:
        failure = news.wait()
    if failure:
        raise ValueError(f"--feature_cache {folder}: {failure}")
    said = json.loads((folder / "cache.json").read_text())
    images, tokens = _shapes(said["images"], stream.size, teacher, grid)
    return Cache(
        _map(folder / "images.bin", images, torch.uint8),
        _map(folder / "tokens.bin", tokens, torch.bfloat16),
        said.get("failed", []),
    )


class _News:
    """What rank 0 tells the others while they wait: None says that it is at work, text how it went."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.told = runtime, time.monotonic()

    def working(self) -> None:
        if time.monotonic() - self.told >= NEWS_SECONDS:
            self.runtime.gather(None)
            self.told = time.monotonic()

    def done(self, failure: str) -> None:
        self.runtime.gather(failure)

    def wait(self) -> str:
        while (failure := self.runtime.gather(None)[0]) is None:
            pass
        return failure


def _shapes(n: int, size: int, teacher: nn.Module, grid: tuple[int, int]) -> tuple[list[int], list[int]]:
    return [n, 3, size, size], [n, teacher.n_cls_tokens + grid[0] * grid[1], teacher.embed_dim]


def _map(path: Path, shape: list[int], dtype: torch.dtype) -> Tensor:
    numel = math.prod(shape)
    if path.stat().st_size != numel * dtype.itemsize:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected {numel * dtype.itemsize:,}")
    return torch.from_file(str(path), size=numel, dtype=dtype).view(shape)


def _list(shards: Sequence[Shard], working: Callable[[], None]) -> tuple[int, str]:
    """Number of images, and a digest of their names and sizes; a damaged tar has none."""
    count, digest = 0, hashlib.sha256()
    for shard in shards:
        entries = []
        with contextlib.suppress(DamagedDataError), shard.open(0) as source:
            entries = [tuple(entry) for entry in source.entries]
        count += len(entries)
        digest.update(f"{shard.name} {entries}\n".encode(errors="surrogateescape"))
        working()
    return count, digest.hexdigest()


def _check(folder: Path, made_of: dict[str, Any]) -> None:
    found = json.loads((folder / "cache.json").read_text()).get("made_of", {})
    if other := [key for key in made_of if made_of[key] != found.get(key)]:
        raise ValueError(
            f"it was made with another {', another '.join(other)}; choose another folder, or remove this one"
        )


def _write(
    folder: Path,
    made_of: dict[str, Any],
    entries: int,
    stream: Stream,
    teacher: nn.Module,
    grid: tuple[int, int],
    runtime: Runtime,
    working: Callable[[], None],
) -> None:
    images, tokens = _shapes(entries, stream.size, teacher, grid)
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = math.prod(images) + 2 * math.prod(tokens), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{needed / GIB:.1f} GiB needed, {free / GIB:.1f} GiB free")
    failed: list[str] = []
    crops, n = _central_crops(stream, failed), 0
    with (
        open(folder / "images.bin", "wb") as images_file,
        open(folder / "tokens.bin", "wb") as tokens_file,
        tqdm(total=entries, unit="image", desc="teacher features", mininterval=1.0) as progress,
    ):
        while batch := list(islice(crops, stream.batch_size)):
            images = torch.stack(batch)  # [B, 3, S, S]
            with runtime.autocast():
                targets = teacher_tokens(teacher, normalize(images.to(runtime.device)), grid)
            tokens = torch.cat(targets, dim=1).bfloat16().cpu()  # [B, C + N, D]
            images_file.write(images.numpy())
            tokens_file.write(tokens.contiguous().view(torch.uint8).numpy())
            n += len(batch)
            progress.update(len(batch))
            working()
    if n == 0:
        raise ValueError(f"no image can be read, the first is {failed[0]}")
    if failed:
        print(f"{folder}: {len(failed)} images or tars cannot be read and are left out, as {failed[0]}")
    said = json.dumps({"images": n, "failed": failed, "made_of": made_of}, indent=2)
    write_atomic(folder / "cache.json", lambda file: file.write(said.encode()))


def _central_crops(stream: Stream, failed: list[str]) -> Iterator[Tensor]:
    """Central squares, uint8 [3, S, S], of all readable images; `failed` gets a line on each other one."""
    for shard in stream.shards:
        try:
            with shard.open(0) as source:
                for entry in source.entries:
                    try:
                        crop = resize_center_crop(decode(source.read(entry)), stream.size, stream.size)
                    except (DamagedDataError, OSError) as error:
                        failed.append(f"{shard.name}: {entry.key!r}: {error}")
                        continue
                    yield crop
        except DamagedDataError as error:
            failed.append(f"{shard.name}: {error}")
