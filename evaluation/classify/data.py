"""Labeled images in class folders or tars, and what training does to them.

Letters: n images, B images of a rank and step, S side of a crop.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from dense.data import unwrap
from feature_bank import list_classes
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixio.data.tar_index import Entry, index_tar, read_member
from pixio.images.crops import resize_center_crop
from pixio.images.decoding import DamagedDataError, decode
from pixio.images.listing import is_junk
from pixio.images.normalization import normalize


@dataclass(frozen=True)
class LabeledImages:
    """The images of a split.

    Attributes:
        files: of which images are read: image files, or tars.
        places: int64 [n, 3]: file, and in tars offset and size of the image; -1 of image files.
        labels: int64 [n].
        classes: names.
    """

    files: list[Path]
    places: np.ndarray
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Of an image, for messages."""
        file, offset, _ = self.places[index]
        return str(self.files[file]) + (f" at byte {offset}" if offset >= 0 else "")

    def read(self, index: int) -> Image.Image:
        """An image, RGB and upright.

        Raises:
            DamagedDataError, OSError: unreadable; the message names the file.
        """
        file, offset, size = self.places[index].tolist()
        try:
            if offset < 0:
                return decode(self.files[file].read_bytes())
            with open(self.files[file], "rb") as tar:
                return decode(read_member(tar.fileno(), Entry("", offset, size)))
        except DamagedDataError as error:
            raise DamagedDataError(f"{self.name(index)} is not a readable image: {error}") from error


def open_images(root: Path, split: str, classes: list[str] | None = None) -> LabeledImages:
    """The images of a split: `SPLIT/CLASS/*` below a folder, or in it tars `*SPLIT*.tar` (ImageNet's layout:
    KEY.jpg with KEY.cls, which holds the number of its class).

    Args:
        root: the folder.
        split: "train" or "val"; tars may spell it "validation".
        classes: of training; None: those found.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: an unreadable tar, an image without a class, or a class that training lacks.
    """
    tars = sorted(tar for tar in root.glob(f"*{split}*.tar") if not is_junk(tar.name))
    if tars and not (root / split).is_dir():
        return _open_tars(tars, classes)
    found = list_classes(root / split, classes)
    files = [found.root / file for shard in found.shards for file in shard.files.split("\0")]
    places = np.stack([np.arange(len(files)), *np.full((2, len(files)), -1)], axis=1)
    return LabeledImages(files, places, found.labels, found.classes)


def _open_tars(tars: list[Path], classes: list[str] | None) -> LabeledImages:
    places, labels = [], []
    for number, path in enumerate(tars):
        with open(path, "rb") as file:
            try:
                images, numbers = index_tar(file).entries, index_tar(file, (".cls",)).entries
                known = {
                    entry.key.rpartition(".")[0]: int(read_member(file.fileno(), entry)) for entry in numbers
                }
            except ValueError as error:
                raise DamagedDataError(f"{path} is no tar of labeled images: {error}") from error
        for entry in images:
            stem = entry.key.rpartition(".")[0]
            if stem not in known:
                raise DamagedDataError(f"{path} has {entry.key}, but no {stem}.cls with its class")
            places.append((number, entry.offset, entry.size))
            labels.append(known[stem])
    classes = classes or [f"class {c}" for c in range(max(*labels, 0) + 1)]
    if foreign := [label for label in labels if not 0 <= label < len(classes)]:
        raise ValueError(f"{tars[0].parent} has class {foreign[0]}, training has 0-{len(classes) - 1}")
    return LabeledImages(tars, np.array(places, np.int64), torch.tensor(labels), classes)


class Batch(NamedTuple):
    """Images with their classes."""

    names: list[str]
    images: Tensor  # normalized, float32 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    seeds: list[tuple[int, ...]]  # of each image's augmentation


@dataclass(frozen=True)
class _Examples(Dataset):
    images: LabeledImages
    prepare: Callable[[Image.Image], Tensor]

    def __getitem__(self, key: tuple[int, ...]) -> tuple | Exception:
        index, *seed = key
        try:
            image = self.images.read(index)
        except (ValueError, OSError) as error:
            return error
        with seeded(*seed):
            return self.images.name(index), self.prepare(image), self.images.labels[index], tuple(seed)


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Make the random numbers of random, numpy and torch a function of `seed` inside, and restore them after.

    Augmentation libraries draw from all three.
    """
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        numbers = np.random.SeedSequence(seed).generate_state(3)
        random.seed(int(numbers[0]))
        np.random.seed(numbers[1])  # noqa: NPY002
        torch.manual_seed(int(numbers[2]))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002


def batches(
    images: LabeledImages,
    keys: Iterator[list[tuple[int, ...]]],
    prepare: Callable[[Image.Image], Tensor],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """Batches of prepared images; each of `keys` names those of a batch, and seeds their augmentation."""
    options = {"num_workers": num_workers, "pin_memory": pin_memory, "collate_fn": _collate}
    return map(unwrap, DataLoader(_Examples(images, prepare), batch_sampler=keys, **options))


def _collate(examples: list[tuple | Exception]) -> Batch | Exception:
    for example in examples:
        if isinstance(example, Exception):
            return example
    names, images, labels, seeds = zip(*examples, strict=True)
    return Batch(list(names), torch.stack(images), torch.stack(labels), list(seeds))


def center(size: int) -> Callable[[Image.Image], Tensor]:
    """Prepare images as k-NN does: shorter side resized to `size`, central crop, normalized."""
    return partial(_center, size=size)


def _center(image: Image.Image, size: int) -> Tensor:
    return normalize(resize_center_crop(image, size, size))
