"""Images with dense targets: how they are read, cropped, and divided among the ranks.

Letters: H x W pixels, S side of a crop, B crops of a rank and step.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from dense.config import DenseConfig
from dense.listing import Listing, Pair, read_split_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixio.images.crops import draw_scaled_crop
from pixio.images.decoding import DamagedDataError, read_turn
from pixio.images.rasters import Box, Raster, open_image

_INSPECTED = (16, 256)  # targets looked at before a split is used; more if the first have no scored pixel

Rasters = tuple[Raster, Raster]  # an image uint8 [H, W, 3] and its target [H, W]
Arrays = tuple[np.ndarray, np.ndarray]  # likewise


class NothingScoredError(ValueError):
    """Targets without a pixel that is scored."""


@dataclass(frozen=True)
class DataSource:
    """A data set: which files it has, how they are read, and how training crops are cut.

    Attributes:
        list_split: root, "train" or "val" -> the pairs.
        published: "train" and "val" -> number of pairs; empty where nothing is published.
        open: image path, target path -> rasters.
        crop: random generator, image, target, S -> arrays [S, S, 3] and [S, S].
        inspect: target files and their targets -> what is odd about them, or nothing; raises
            `NothingScoredError`.
        folders: below the root, where paths in split files may start.
    """

    list_split: Callable[[Path, str], Listing]
    published: dict[str, int]
    open: Callable[[Path, Path], Rasters]
    crop: Callable[[np.random.Generator, Raster, Raster, int], Arrays]
    inspect: Callable[[Iterable[tuple[Path, Tensor]]], str]
    folders: tuple[str, ...] = ()


class Example(NamedTuple):
    """One image with its target; a batch of crops has a leading dimension B in both tensors."""

    names: list[str]  # of the image files, for messages
    image: Tensor  # uint8 [3, H, W]
    target: Tensor  # [H, W], depth float32 in meters or class uint8


@dataclass(frozen=True)
class PairDataset(Dataset):
    """The examples of a split. What cannot be read is returned as the exception: `unwrap` raises it outside
    of the worker process, without its traceback.

    Args:
        root: folder the pairs are relative to.
        pairs: the files.
        open: see `DataSource`.
        crop: random generator, image, target -> crops; None leaves examples whole.
    """

    root: Path
    pairs: list[Pair]
    open: Callable[[Path, Path], Rasters]
    crop: Callable[[np.random.Generator, Raster, Raster], Arrays] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, ...]) -> Example | Exception:
        """Example `key[0]`; what follows in `key` seeds the crop."""
        index, *entropy = key
        image_path, target_path = (self.root / path for path in self.pairs[index])
        try:
            image, target = self.open(image_path, target_path)
            if (image.height, image.width) != (target.height, target.width):
                raise ValueError(
                    f"{target_path} has {target.height} x {target.width} pixels, but its image "
                    f"{image_path} {image.height} x {image.width}: both must be the same. "
                    + describe_turn(image_path)
                )
            if self.crop:
                image, target = self.crop(np.random.default_rng(entropy), image, target)
            else:
                image, target = image.whole(), target.whole()
        except (ValueError, OSError) as error:
            return error
        image, target = (np.require(array, requirements="CW") for array in (image, target))
        return Example([str(image_path)], torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(target))


def open_split(
    source: DataSource, config: DenseConfig, split: str, crop_size: int | None, warns: bool
) -> PairDataset:
    """The examples of a split. Their number should be the published one, and some targets are looked at.

    Args:
        source: the data set.
        config: its folder, split files, and whether another number is an error.
        split: "train" or "val".
        crop_size: S of random crops; None leaves examples whole.
        warns: print a warning of what may be a mistake.

    Raises:
        FileNotFoundError: no such folder or split file, or nothing in it.
        ValueError: an unreadable split file, another number of pairs with `--expect_count`, a target that
            cannot be used, or none of those looked at has a pixel that is scored.
    """
    root = Path(config.data_root)
    if not root.is_dir():
        raise FileNotFoundError(f"no data in {root.absolute()}: there is no such folder; set --data_root")
    file = config.train_split_file if split == "train" else config.val_split_file
    if file:
        pairs, missing = read_split_file(root, Path(file), source.folders), []
    else:
        pairs, missing = source.list_split(root, split)
    lacking = ""
    if missing:
        named = ", ".join(missing[:3])
        lacking = f"; missing {named}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if not pairs and file:
        raise FileNotFoundError(f"{Path(file).absolute()} names no {split} pairs")
    if not pairs:
        raise FileNotFoundError(
            f"{root.absolute()} holds no {split} pairs{lacking}; see docs/evaluation.md for its layout"
        )
    data = PairDataset(root, pairs, source.open, partial(source.crop, size=crop_size) if crop_size else None)
    published, warnings = source.published.get(split, len(pairs)), []
    if not file and len(pairs) != published:
        warnings = [f"{root} holds {len(pairs)} {split} pairs, the published split {published}{lacking}"]
        if config.expect_count:
            raise ValueError(*warnings)
    for warning in (*warnings, *_oddities(source, data, config.apply_exif)):
        if warning and warns:
            print(f"warning: {warning}", file=sys.stderr)
    return data


def _oddities(source: DataSource, data: PairDataset, applies_exif: bool) -> Iterator[str]:
    """What is odd about some targets of a split, evenly spaced, and their images."""
    for most in _INSPECTED:
        count = min(most, len(data))
        indices = [i * len(data) // count for i in range(count)]
        pairs = [data.pairs[index] for index in indices]
        examples = whole_examples(replace(data, crop=None), indices, num_workers=0, pin_memory=False)
        targets = ((data.root / pair.target, x.target) for pair, x in zip(pairs, examples, strict=True))
        try:
            yield source.inspect(targets)
            break
        except NothingScoredError:
            if most == _INSPECTED[-1] or count == len(data):
                raise
    if not applies_exif:
        yield next(filter(None, (describe_turn(data.root / pair.image) for pair in pairs)), "")


def describe_turn(path: Path) -> str:
    """What EXIF says of how the camera was held, where it was not upright; else nothing."""
    turn = read_turn(path.read_bytes())
    return "" if turn == 1 else f"EXIF turns {path} (orientation {turn}), --apply_exif applies it"


def open_photo(path: Path, upright: bool = False) -> Raster:
    """Open an image.

    Args:
        path: image file.
        upright: turn it as EXIF says; else the pixels stay where they are stored.

    Returns:
        A raster of uint8 [h, w, 3].

    Raises:
        DamagedDataError: unreadable, here or when decoding; the message names the file.
    """

    def decode(box: Box) -> np.ndarray:
        try:
            return image.decode(box)
        except DamagedDataError as error:
            raise DamagedDataError(f"{path} is not a readable image: {error}") from error

    try:
        image = open_image(path.read_bytes(), upright)
    except DamagedDataError as error:
        raise DamagedDataError(f"{path} is not a readable image: {error}") from error
    return replace(image, decode=decode)


def crop_and_flip(
    rng: np.random.Generator,
    image: Raster,
    target: Raster,
    size: int,
    fill: float,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Arrays:
    """A random square of image and target, mirrored half of the time.

    Smaller images are padded on the right and below: with 0 (black), the target with `fill` (not scored).

    Args:
        rng: source of randomness.
        image, target: of the same size.
        size: S in pixels.
        fill: value of padded target pixels.
        scales: range in which the longer side is scaled before, the image bicubic, the target nearest.

    Returns:
        uint8 [S, S, 3] and [S, S].
    """
    crop = draw_scaled_crop(rng, target.height, target.width, size, scales)
    return crop.of_image(image), crop.of_target(target, fill)


@dataclass(frozen=True)
class StepSampler:
    """Which examples make up which step: a new permutation per epoch, the same steps on any number of ranks.

    The last, incomplete step of an epoch is dropped; a data set smaller than one step is repeated.

    Args:
        examples: number of examples.
        per_step: examples of a step, over all ranks.
        seed: of permutations and crops.
    """

    examples: int
    per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return max(self.examples // self.per_step, 1)

    def keys(self, start: int, stop: int, rank: int, world_size: int) -> Iterator[list[tuple[int, ...]]]:
        """Per step from `start` on, a rank's keys into `PairDataset`: the example, then its crop's seed."""
        share = self.per_step // world_size
        order, ordered = None, -1
        for step in range(start, stop):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != ordered:
                order, ordered = self._permutation(epoch), epoch
            first = step_of_epoch * self.per_step + rank * share
            # counted from 1: a final 0 would seed as the permutation is seeded
            yield [(int(order[i]), self.seed, epoch, i + 1) for i in range(first, first + share)]

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        rounds = -(-self.per_step // self.examples)  # 1 unless the data set is smaller than a step
        return np.concatenate([rng.permutation(self.examples) for _ in range(rounds)])


def unwrap(example: Example | Exception) -> Example:
    """The example, or the reason why there is none, raised."""
    if isinstance(example, Exception):
        raise example
    return example


def train_batches(
    data: PairDataset, keys: Iterator[list[tuple[int, ...]]], num_workers: int, pin_memory: bool
) -> Iterator[Example]:
    """Batches of crops: names, uint8 [B, 3, S, S], targets [B, S, S]."""
    options = {"num_workers": num_workers, "pin_memory": pin_memory, "collate_fn": _collate}
    return map(unwrap, DataLoader(data, batch_sampler=keys, **options))


def whole_examples(
    data: PairDataset, indices: Iterable[int], num_workers: int, pin_memory: bool
) -> Iterator[Example]:
    """Examples one by one and uncropped."""
    keys = [(index,) for index in indices]
    options = {"num_workers": num_workers, "pin_memory": pin_memory}
    return map(unwrap, DataLoader(data, batch_size=None, sampler=keys, **options))


def _collate(examples: list[Example | Exception]) -> Example | Exception:
    for example in examples:
        if isinstance(example, Exception):
            return example
    names, images, targets = zip(*examples, strict=True)
    return Example([name for (name,) in names], torch.stack(images), torch.stack(targets))
