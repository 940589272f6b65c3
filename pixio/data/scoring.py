"""The scores of web images that need no model, and the pixels for those that do, tar by tar."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pixio.data.curation import ENTROPY_SIZE, color_entropy
from pixio.data.shards import OpenShard, TarShard
from pixio.images.crops import decode_crop, whole_box
from pixio.images.decoding import DamagedDataError, read_size

ENTROPY_DIGITS = 4


class ScoredBatch(NamedTuple):
    """Some images of a tar, in its order; which ones does not depend on who reads them."""

    tar: int
    records: dict[str, dict[str, Any]]  # of all images of the batch
    names: list[str]  # of those that a model is to score, with
    pixels: Tensor  # uint8 [n, 3, S, S] and
    seeds: list[int]  # one for each, from the image's bytes
    members: int  # of the whole tar; 0 if it cannot be read
    last: bool
    error: str = ""  # of the tar


@dataclass(frozen=True)
class TarScorer(IterableDataset):
    """Scores the images of tars in batches; worker w of W reads every W-th tar.

    Args:
        shards: the tars.
        scores: of `pixio.data.curation.SCORES`; for `loss` the pixels are given.
        size: side S of the model's input in pixels.
        batch_size: images per batch.
    """

    shards: Sequence[TarShard]
    scores: Sequence[str]
    size: int
    batch_size: int

    def __iter__(self) -> Iterator[ScoredBatch]:
        info = get_worker_info()
        for tar in range(info.id if info else 0, len(self.shards), info.num_workers if info else 1):
            try:
                with self.shards[tar].open(0) as source:
                    for first in range(0, len(source.entries), self.batch_size):
                        yield self._score(tar, source, first)
            except (DamagedDataError, OSError) as error:
                yield ScoredBatch(tar, {}, [], self._stack([]), [], 0, True, str(error))

    def _score(self, tar: int, source: OpenShard, first: int) -> ScoredBatch:
        records: dict[str, dict[str, Any]] = {}
        names, images, seeds = [], [], []
        stop = first + self.batch_size
        for entry in source.entries[first:stop]:
            try:
                data = source.read(entry)
                width, height = read_size(data)
                record: dict[str, Any] = {"width": width, "height": height}
                records[entry.key] = record
                if "entropy" in self.scores:
                    pixels = decode_crop(data, ENTROPY_SIZE, whole_box)
                    record["histogram_score"] = round(color_entropy(pixels), ENTROPY_DIGITS)
                if "loss" in self.scores:
                    if "entropy" not in self.scores or self.size != ENTROPY_SIZE:
                        pixels = decode_crop(data, self.size, whole_box)
                    names.append(entry.key)
                    images.append(pixels)
                    seeds.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"))
            except DamagedDataError as error:  # but where the disk fails the tar is to be tried again
                records[entry.key] = {"error": str(error)}
        count = len(source.entries)
        last = stop >= count
        damage = source.damage if last else ""
        return ScoredBatch(tar, records, names, self._stack(images), seeds, count, last, damage)

    def _stack(self, images: list[Tensor]) -> Tensor:
        return torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
