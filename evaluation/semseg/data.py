"""Segmentation data sets: ADE20K, Pascal VOC (augmented), LoveDA, and folders of your own."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from dense.data import DataSource, NothingScoredError, Rasters, crop_and_flip, open_photo
from dense.listing import Listing, Pair, list_below, list_existing, list_folder
from torch import Tensor

from pixio.images.rasters import Box
from pixio.images.targets import IGNORE, drop_zero, open_mask

PUBLISHED = {
    "ade20k": {"train": 20_210, "val": 2_000},
    "pascal": {"train": 10_582, "val": 1_449},
    "loveda": {"train": 2_522, "val": 1_669},
}
CLASS_NAMES = yaml.safe_load(Path(__file__).with_name("class_names.yaml").read_text(encoding="utf-8"))
SCALES = (0.5, 2.0)  # of the longer side, in training

_PASCAL_VAL = Path(__file__).with_name("pascal_val.txt")
# Numbers of the first and last tile of each half.
_LOVEDA = {
    "train": {"Rural": (0, 1365), "Urban": (1366, 2521)},
    "val": {"Rural": (2522, 3513), "Urban": (3514, 4190)},
}
_REMEDIES = {
    "ade20k": "the original annotations (0 = other, 1-150) need --reduce_zero_label",
    "pascal": "expected are class numbers (palette or gray), not colors",
    "loveda": "original masks (0 = no data, 1-7) need `python semseg/util/process_loveda.py DATA_ROOT` once",
    "folder": "set --nclass, or --reduce_zero_label if 0 is not a class",
}


def list_ade20k(root: Path, split: str) -> Listing:
    """`ADE_train_00000001` to `ADE_train_00020210`, or `ADE_val_00000001` to `ADE_val_00002000`."""
    folder = {"train": "training", "val": "validation"}[split]
    names = (f"{folder}/ADE_{split}_{n:08d}" for n in range(1, PUBLISHED["ade20k"][split] + 1))
    return list_existing(root, [Pair(f"images/{name}.jpg", f"annotations/{name}.png") for name in names])


def list_pascal(root: Path, split: str) -> Listing:
    """Validation: the names in VOC2012's list, or else in our copy. Training: every other mask."""
    file = root / "ImageSets/Segmentation/val.txt"
    if file.is_file():
        names = file.read_text(encoding="utf-8-sig").split()
    else:
        years = (line.split() for line in _PASCAL_VAL.read_text(encoding="utf-8").splitlines()[1:])
        names = [f"{year}{int(number):06d}" for year, *numbers in years for number in numbers]
    if split == "train":
        validation = set(names)
        masks = (Path(path) for path in list_below(root, "SegmentationClass", (".png",)))
        names = [mask.stem for mask in masks if mask.stem not in validation]
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


RULES = {
    "ade20k": list_ade20k,
    "pascal": list_pascal,
    "loveda": list_loveda,
    "folder": partial(list_folder, targets="masks", suffixes=(".png",)),
}


def open_mask_pair(
    image_path: Path, mask_path: Path, nclass: int, reduce_zero_label: bool, upright: bool, remedy: str
) -> Rasters:
    """Image uint8 [H, W, 3] and mask uint8 [H, W] of classes below `nclass`, 255 = ignored."""
    stored = open_mask(mask_path)

    def classes(box: Box) -> np.ndarray:
        mask = stored.decode(box)
        if reduce_zero_label:
            mask = drop_zero(mask)
        wrong = mask[(mask >= nclass) & (mask != IGNORE)]
        if wrong.size:
            raise ValueError(
                f"{mask_path} holds class {wrong.max()}, expected 0-{nclass - 1} or {IGNORE} (ignored): "
                f"{remedy}"
            )
        return mask

    return open_photo(image_path, upright), replace(stored, decode=classes)


def inspect_masks(
    masks: Iterable[tuple[Path, Tensor]], nclass: int, reduce_zero_label: bool, remedy: str
) -> str:
    """What is odd about mask files [H, W] with classes, or nothing: one class alone, for example.

    Raises:
        NothingScoredError: no pixel of them is scored.
    """
    rows = [(path, mask.flatten().bincount(minlength=nclass)[:nclass]) for path, mask in masks]
    classes = sum(pixels for _, pixels in rows).nonzero().flatten().tolist()
    ignored = (
        f"0 (ignored by --reduce_zero_label) and {IGNORE}" if reduce_zero_label else f"{IGNORE} (ignored)"
    )
    if not classes:
        raise NothingScoredError(
            f"no pixel of {len(rows)} masks is scored: {rows[0][0]} holds {ignored} alone, expected class "
            f"numbers from {int(reduce_zero_label)}: {remedy}"
        )
    if len(classes) == 1 < min(nclass, len(rows)):
        return (
            f"{len(rows)} masks such as {rows[0][0]} hold class {classes[0]} of {nclass} alone, beside "
            f"{ignored}: an object stored as {IGNORE} needs a class number"
        )
    empty = [str(path) for path, pixels in rows if not pixels.any()]
    return f"{len(empty)} of {len(rows)} masks have no scored pixel, such as {empty[0]}" if empty else ""


def mask_source(dataset: str, nclass: int, reduce_zero_label: bool, upright: bool) -> DataSource:
    """A segmentation data set; its training images are scaled, cropped and mirrored.

    Args:
        dataset: a key of `RULES`.
        nclass: number of classes.
        reduce_zero_label: the masks count classes from 1, 0 is ignored.
        upright: turn images as EXIF says.
    """
    rules = {"nclass": nclass, "reduce_zero_label": reduce_zero_label, "remedy": _REMEDIES[dataset]}
    return DataSource(
        list_split=RULES[dataset],
        published=PUBLISHED.get(dataset, {}),
        open=partial(open_mask_pair, upright=upright, **rules),
        crop=partial(crop_and_flip, fill=IGNORE, scales=SCALES),
        inspect=partial(inspect_masks, **rules),
    )
