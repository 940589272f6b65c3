"""Segmentation data sets: ADE20K, Pascal VOC (augmented), LoveDA, and folders of one's own."""

from functools import partial
from pathlib import Path

import numpy as np
from pairs import (
    Arrays,
    Listing,
    Pair,
    Pairs,
    crop_and_flip,
    find,
    list_existing,
    list_folder,
    list_pairs,
    read_image,
    read_png,
)
from PIL import Image
from semseg import classes
from semseg.metrics import IGNORE

COUNTS = {
    "ade20k": {"train": 20_210, "val": 2_000},
    "pascal": {"train": 10_582, "val": 1_449},
    "loveda": {"train": 2_522, "val": 1_669},
    "folder": {"train": None, "val": None},
}
CLASS_NAMES = {"ade20k": classes.ADE20K, "pascal": classes.PASCAL, "loveda": classes.LOVEDA}

# Numbers of the first and last tile of each half.
_LOVEDA = {
    "train": {"Rural": (0, 1365), "Urban": (1366, 2521)},
    "val": {"Rural": (2522, 3513), "Urban": (3514, 4190)},
}
_REMEDIES = {
    "ade20k": "the original annotations (0 = other, 1-150) need --reduce_zero_label",
    "pascal": "expected are class numbers (palette or grey), not colours",
    "loveda": "original masks (0 = no data, 1-7) need `python semseg/util/process_loveda.py DATA_ROOT` once",
    "folder": "set --nclass, or --reduce_zero_label if 0 is not a class",
}


def list_ade20k(root: Path, split: str) -> Listing:
    """`ADE_train_00000001` to `ADE_train_00020210`, or `ADE_val_00000001` to `ADE_val_00002000`."""
    folder = {"train": "training", "val": "validation"}[split]
    names = (f"{folder}/ADE_{split}_{n:08d}" for n in range(1, COUNTS["ade20k"][split] + 1))
    return list_existing(root, [Pair(f"images/{name}.jpg", f"annotations/{name}.png") for name in names])


def list_pascal(root: Path, split: str) -> Listing:
    """Validation: the names in VOC2012's own list. Training: every other mask."""
    file = root / "ImageSets/Segmentation/val.txt"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it is part of VOCtrainval_11-May-2012.tar")
    names = file.read_text(encoding="utf-8").split()
    if split == "train":
        validation = set(names)
        masks = (Path(path).stem for path in find(root, "SegmentationClass/*.png"))
        names = [name for name in masks if name not in validation]
    return list_existing(
        root, [Pair(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in names]
    )


def list_loveda(root: Path, split: str) -> Listing:
    """The numbered tiles of both halves."""
    top = split.title()
    return list_existing(
        root,
        [
            Pair(f"{top}/{top}/{half}/images_png/{n}.png", f"{top}/{top}/{half}/masks_png/{n}.png")
            for half, (first, last) in _LOVEDA[split].items()
            for n in range(first, last + 1)
        ],
    )


def _list_folder(root: Path, split: str) -> Listing:
    return list_folder(root, split, "masks", (".png",))


RULES = {"ade20k": list_ade20k, "pascal": list_pascal, "loveda": list_loveda, "folder": _list_folder}


def read_mask(path: Path) -> np.ndarray:
    """Class numbers as stored, uint8 [H, W]."""
    return read_png(path, ("L", "P"), "8-bit grey or palette, with the number of the class in each pixel")


def drop_zero(mask: np.ndarray) -> np.ndarray:
    """Masks that count classes from 1: 0 becomes ignored, 1 becomes 0, …; 255 stays ignored. uint8."""
    return np.where((mask == 0) | (mask == IGNORE), IGNORE, mask - 1).astype(np.uint8)


def read_pair(image_path: Path, mask_path: Path, nclass: int, reduce_zero_label: bool, remedy: str) -> Arrays:
    """Image uint8 [H, W, 3] and mask uint8 [H, W] of classes below `nclass`, 255 = ignored."""
    mask = read_mask(mask_path)
    if reduce_zero_label:
        mask = drop_zero(mask)
    wrong = mask[(mask >= nclass) & (mask != IGNORE)]
    if wrong.size:
        raise ValueError(
            f"{mask_path} holds class {wrong.max()}, expected 0-{nclass - 1} or {IGNORE} (ignored): {remedy}"
        )
    return read_image(image_path), mask


def scale_crop_flip(
    rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scale the longer side by 0.5-2 (bicubic, mask nearest), then a random crop, mirrored half of the time.

    Returns:
        uint8 [S, S, 3] and [S, S]; beyond the image black, and ignored.
    """
    height, width = mask.shape
    long = max(height, width)
    new = int(rng.integers(int(0.5 * long), 2 * long + 1))
    shape = (max(round(width * new / long), 1), max(round(height * new / long), 1))
    image = np.array(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))
    mask = np.array(Image.fromarray(mask).resize(shape, Image.Resampling.NEAREST))
    return crop_and_flip(rng, image, mask, size, fill=IGNORE)


def open_split(
    dataset: str,
    root: str,
    split: str,
    split_file: str | None,
    crop_size: int | None,
    nclass: int,
    reduce_zero_label: bool,
) -> Pairs:
    """The items of a split.

    Args:
        dataset: a key of `RULES`.
        root: folder of the data.
        split: "train" or "val".
        split_file: list of pairs instead of the rule.
        crop_size: side of random crops of the scaled images; None leaves items whole.
        nclass: number of classes.
        reduce_zero_label: the masks count classes from 1, 0 is ignored.

    Raises:
        FileNotFoundError, ValueError: see `pairs.list_pairs`.
    """
    pairs, complaint = list_pairs(root, split, split_file, RULES[dataset], COUNTS[dataset][split])
    read = partial(read_pair, nclass=nclass, reduce_zero_label=reduce_zero_label, remedy=_REMEDIES[dataset])
    augment = partial(scale_crop_flip, size=crop_size) if crop_size else None
    return Pairs(Path(root), pairs, complaint, read, augment)
