"""Teacher tokens of un-augmented images, computed once and mapped from disk: distillation on small machines.

Not the published recipe: there teacher and students see a new random crop at every visit; from a cache they
see the same central square each time, so that the students learn less from the same images and overfit
sooner.

A cache is a folder: `images.bin`, uint8 [n, 3, S, S]; `tokens.bin`, bfloat16 [n, C + N, D], class tokens
first; and `cache.json`, written last, which says what they were made of. Letters: n images, S side in pixels,
C class tokens, N patches of the students' grid, D teacher width, B images of a batch.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from teachers import teacher_tokens
from torch import Tensor, nn
from tqdm import tqdm

from pixio.adaptors import fingerprint
from pixio.data import DamagedDataError, Stream, decode, normalise, resize_centre_crop
from pixio.data.shards import SceneShard, Shard, generator
from pixio.engine.checkpoint import write_atomic
from pixio.engine.runtime import GIB, Runtime


class CachedBatches:
    """Batches of one rank from a cache, without end: those of `pixio.data.Loader`, with `tokens`.

    A pass visits every image once, in an order that is a pure function of the seed and the pass. The images
    that all ranks have seen tell where it stands, so nothing else needs saving.

    Args:
        cache: images and tokens, from `open_cache`.
        stream: its batch size B, per rank, and its seed.
        rank, world_size: of this process.
        seen: images that all ranks have seen.
    """

    def __init__(
        self, cache: tuple[Tensor, Tensor], stream: Stream, rank: int, world_size: int, seen: int
    ) -> None:
        self.images, self.tokens = cache
        self.stream = stream
        self.rank, self.world_size, self.seen = rank, world_size, seen
        self.counts: dict[str, int] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        n, size, number, order = len(self.images), self.stream.batch_size, -1, []
        while True:
            rows = []
            first = self.seen + self.rank * size
            for visit in range(first, first + size):
                if visit // n != number:
                    number = visit // n
                    order = generator(self.stream.seed, "cache", number).permutation(n).tolist()
                rows.append(order[visit % n])
            self.seen += size * self.world_size
            yield {"images": self.images[rows], "tokens": self.tokens[rows]}

    def state_dict(self) -> None:
        """Nothing: the run counts the images."""


def open_cache(
    folder: Path, stream: Stream, teacher: nn.Module, grid: tuple[int, int], runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Map the cache of a training set, which rank 0 writes first if `folder` has none; a collective.

    Args:
        folder: made when missing, on a disk that all ranks see.
        stream: its images; the shorter side is resized to its size S, and the central square kept.
        teacher: from `load_teacher`.
        grid: of the students, in patches.
        runtime: the ranks.

    Returns:
        Images uint8 [n, 3, S, S] and tokens bfloat16 [n, C + N, D], which are read from the disk where
        indexed. Images that cannot be read are left out.

    Raises:
        ValueError: the folder holds another cache or a damaged one, the disk is too small, or the set is
            curated, has no end or no readable image.
    """
    if stream.curation or isinstance(stream.shards[0], SceneShard):
        raise ValueError(
            "--feature_cache needs a fixed set of images: curation draws anew at every visit, and scenes "
            "never end (write some with `pixio scenes`, and read them with --dataset_type folder)"
        )
    failure = None
    if runtime.is_main:
        try:
            entries, data = _list(stream.shards)
            made_of = {
                "teacher": fingerprint(teacher),
                "precision": str(runtime.dtype),
                "data": data,
                "size": stream.size,
                "grid": list(grid),
            }
            if (folder / "cache.json").is_file():
                _check(folder, made_of)
            else:
                _write(folder, made_of, entries, stream, teacher, grid, runtime)
        except (ValueError, OSError) as error:
            failure = str(error)
    if failure := runtime.gather(failure)[0]:
        raise ValueError(f"--feature_cache {folder}: {failure}")
    n = json.loads((folder / "cache.json").read_text())["images"]
    images, tokens = _shapes(n, stream.size, teacher, grid)
    return _map(folder / "images.bin", images, torch.uint8), _map(
        folder / "tokens.bin", tokens, torch.bfloat16
    )


def _shapes(n: int, size: int, teacher: nn.Module, grid: tuple[int, int]) -> tuple[list[int], list[int]]:
    return [n, 3, size, size], [n, teacher.n_cls_tokens + grid[0] * grid[1], teacher.embed_dim]


def _map(path: Path, shape: list[int], dtype: torch.dtype) -> Tensor:
    numel = math.prod(shape)
    if path.stat().st_size != numel * dtype.itemsize:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected {numel * dtype.itemsize:,}")
    return torch.from_file(str(path), size=numel, dtype=dtype).view(shape)


def _list(shards: Sequence[Shard]) -> tuple[int, str]:
    """Number of images, and a digest of their names and sizes."""
    count, digest = 0, hashlib.sha256()
    for shard in shards:
        with shard.open(0) as source:
            count += len(source.entries)
            digest.update(f"{shard.name} {[tuple(entry) for entry in source.entries]}\n".encode())
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
) -> None:
    images, tokens = _shapes(entries, stream.size, teacher, grid)
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = math.prod(images) + 2 * math.prod(tokens), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{needed / GIB:.1f} GiB needed, {free / GIB:.1f} GiB free")
    crops, n = _central_crops(stream), 0
    with (
        open(folder / "images.bin", "wb") as images_file,
        open(folder / "tokens.bin", "wb") as tokens_file,
        tqdm(total=entries, unit="image", desc="teacher features", mininterval=1.0) as progress,
    ):
        while batch := list(islice(crops, stream.batch_size)):
            images = torch.stack(batch)  # [B, 3, S, S]
            with runtime.autocast():
                targets = teacher_tokens(teacher, normalise(images.to(runtime.device)), grid)
            tokens = torch.cat(targets, dim=1).bfloat16().cpu()  # [B, C + N, D]
            images_file.write(images.numpy())
            tokens_file.write(tokens.contiguous().view(torch.uint8).numpy())
            n += len(batch)
            progress.update(len(batch))
    if n == 0:
        raise ValueError(f"none of {entries} images could be read")
    if n < entries:
        print(f"{folder}: {entries - n} of {entries} images could not be read and are left out")
    said = json.dumps({"images": n, "made_of": made_of}, indent=2)
    write_atomic(folder / "cache.json", lambda file: file.write(said.encode()))


def _central_crops(stream: Stream) -> Iterator[Tensor]:
    """Central squares, uint8 [3, S, S], of all readable images."""
    for shard in stream.shards:
        with shard.open(0) as source:
            for entry in source.entries:
                try:
                    data = source.read(entry)
                    image = decode(data) if isinstance(data, bytes) else Image.fromarray(data)
                    crop = resize_centre_crop(image, stream.size, stream.size)
                except (DamagedDataError, OSError):
                    continue
                yield crop
