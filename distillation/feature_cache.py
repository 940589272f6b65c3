"""Teacher tokens of un-augmented images, computed once and mapped from disk: distillation on small machines.

Not the published recipe: there teacher and students see a new random crop at every visit; from a cache they
see the same central square each time, so that the students learn less from the same images and overfit
sooner.

Letters: n images, S side in pixels, C class tokens, N patches of the students' grid, D teacher width, B
images of a batch.
"""

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from teachers import teacher_tokens
from torch import Tensor, nn

from pixio.data import Stream
from pixio.data.randomness import generator
from pixio.data.shards import SceneShard
from pixio.engine.runtime import Runtime
from pixio.features.extraction import Arrays, CenterCropped, FeatureExtractor, index_shards
from pixio.features.store import FeatureStore, StoredArray
from pixio.images.normalization import normalize

PART = 512  # images


class Cache(NamedTuple):
    """Images uint8 [n, 3, S, S], their tokens bfloat16 [n, C + N, D], and a line on each thing left out."""

    images: StoredArray | Tensor
    tokens: StoredArray | Tensor
    failed: Sequence[str] = ()


class CachedBatches:
    """Batches of one rank from a cache, without end: those of `pixio.data.Loader`, with `tokens`.

    An epoch visits every image once, in an order that is a pure function of the seed and the epoch. The
    number of images that all ranks have seen is the whole state.

    Args:
        cache: from `open_cache`.
        stream: its batch size B, per rank, and its seed.
        rank, world_size: of this process.
        seen: images that all ranks have seen.
        pin_memory: give batches in pinned memory.

    Attributes:
        counts: images seen and kept, which here are the same, since this object was made.
    """

    def __init__(
        self, cache: Cache, stream: Stream, rank: int, world_size: int, seen: int, pin_memory: bool = False
    ) -> None:
        self.cache, self.stream, self.pin_memory = cache, stream, pin_memory
        self.rank, self.world_size, self.seen = rank, world_size, seen
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Generator[dict[str, Tensor], None, None]:
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
            batch = {"images": self.cache.images[rows], "tokens": self.cache.tokens[rows]}
            yield {name: part.pin_memory() if self.pin_memory else part for name, part in batch.items()}

    def state_dict(self) -> None:
        """Nothing: the run counts the images."""

    def report(self) -> dict[str, Any]:
        """As `pixio.data.Loader.report`; what the cache leaves out is named by rank 0."""
        return {"counts": dict(self.counts), "errors": list(self.cache.failed) if self.rank == 0 else []}


@dataclass(frozen=True)
class TeacherTokens(CenterCropped):
    """What a cache holds of each image: `images` uint8 [3, S, S] and `tokens` bfloat16 [C + N, D]."""

    grid: tuple[int, int]
    remedy = "use --dtype fp32"

    def compute(self, encoder: nn.Module, images: Tensor) -> Arrays:
        """Central crops and the teacher's tokens, class tokens first, of images uint8 [B, 3, S, S]."""
        tokens = torch.cat(teacher_tokens(encoder, normalize(images), self.grid), dim=1)  # [B, C + N, D]
        return {"images": images.clone(), "tokens": tokens.bfloat16()}  # the input lies in shared memory


def open_cache(
    folder: Path,
    stream: Stream,
    teacher: nn.Module,
    grid: tuple[int, int],
    runtime: Runtime,
    workers: int = 0,
) -> Cache:
    """Collective: map the cache of a training set; the ranks first compute together what it lacks.

    Args:
        folder: made when missing, on a disk that all ranks see.
        stream: its images; the shorter side is resized to its size S, and the central square kept.
        teacher: from `load_teacher`, whole on every rank.
        grid: of the students, in patches.
        runtime: the ranks.
        workers: processes that read images in each rank.

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
    if (folder / "cache.json").exists():
        raise ValueError(
            f"--feature_cache {folder} is of an earlier version: choose another folder, or remove this one"
        )
    index = index_shards(stream.shards, PART, skip_damaged=True)
    if not index.parts:
        raise ValueError(f"no tar can be read, the first is {index.damaged[0]}")
    settings = {
        "teacher": teacher.fingerprint,
        "precision": str(runtime.dtype),
        "data": index.digest,
        "size": stream.size,
        "grid": list(grid),
    }
    store = FeatureStore(folder, stream.shards, index.parts, settings)
    spec = TeacherTokens(stream.size, stream.size, grid)
    errors = store.fill(FeatureExtractor(teacher, spec, runtime, stream.batch_size, workers)).errors
    cache = Cache(store.array("images"), store.array("tokens"), [*index.damaged, *errors])
    if cache.failed and runtime.is_main:
        print(
            f"{folder}: {len(cache.failed)} images or tars cannot be read and are left out, "
            f"as {cache.failed[0]}"
        )
    return cache
