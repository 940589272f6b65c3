"""Depth data sets: NYUv2, KITTI (Eigen split), and one's own folders. Depth in metres, 0 = not measured."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
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

COUNTS = {
    "nyuv2": {"train": 24_231, "val": 654},
    "kitti": {"train": 23_158, "val": 652},
    "folder": {"train": None, "val": None},
}
PNG_UNITS_PER_METRE = {"nyuv2": 1000.0, "kitti": 256.0}

_NYUV2_SIZE = (480, 640)
_NYUV2_KEPT = (slice(45, 471), slice(41, 601))  # without the white frame: rows 45-470, columns 41-600
_EIGEN = Path(__file__).with_name("kitti_eigen.txt")


def list_nyuv2(root: Path, split: str) -> Listing:
    """Every `rgb_*.jpg` with its `sync_depth_*.png`, in the folders of the split."""
    folder = "sync" if split == "train" else "official_splits/test"
    images = find(root, f"{folder}/*/rgb_*.jpg")
    return list_existing(
        root, [Pair(image, re.sub(r"rgb_([^/]*)\.jpg$", r"sync_depth_\1.png", image)) for image in images]
    )


def list_kitti(root: Path, split: str) -> Listing:
    """The frames of the Eigen split."""
    return list_existing(root, _eigen_pairs(split))


def _eigen_pairs(split: str) -> Iterator[Pair]:
    for line in _EIGEN.read_text(encoding="utf-8").splitlines():
        name, drive, *runs = line.split()
        if name != split:
            continue
        for run in runs:
            first, last, step = re.fullmatch(r"(\d+)(?:-(\d+))?(?:/(\d+))?", run).groups()
            for frame in range(int(first), int(last or first) + 1, int(step or 1)):
                yield Pair(
                    f"images/{drive[:10]}/{drive}_sync/image_02/data/{frame:010d}.png",
                    f"annotations/{drive}_sync/proj_depth/groundtruth/image_02/{frame:010d}.png",
                )


def _list_folder(root: Path, split: str) -> Listing:
    return list_folder(root, split, "depth", (".png", ".npy"))


RULES = {"nyuv2": list_nyuv2, "kitti": list_kitti, "folder": _list_folder}


def read_depth(path: Path, units_per_metre: float) -> np.ndarray:
    """Depth in metres, float32 [H, W], 0 where it is unknown.

    Args:
        path: a 16-bit grey PNG, or an .npy file with metres (unknown: 0, NaN or infinity).
        units_per_metre: PNG values per metre.

    Raises:
        ValueError: unreadable, of another bit depth or shape; the message names the file.
    """
    if path.suffix.lower() != ".npy":
        values = read_png(path, ("I;16", "I"), "16-bit grey, as depth in fractions of a metre needs")
        return (values / units_per_metre).astype(np.float32)
    try:
        values = open_memmap(path, mode="r")  # not `load`, which also opens archives and believes any size
    except OSError:
        raise
    except Exception as error:  # a header is a piece of Python, and fails in as many ways
        raise ValueError(f"{path} is not a readable .npy file: {error}") from error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {values.dtype} {list(values.shape)}, expected floats [H, W] in metres"
        )
    return np.where(np.isfinite(values), values, 0).astype(np.float32)


def read_pair(image_path: Path, depth_path: Path, dataset: str, units_per_metre: float) -> Arrays:
    """Image uint8 [H, W, 3] and depth float32 [H, W], for NYUv2 without the frame around both."""
    image, depth = read_image(image_path), read_depth(depth_path, units_per_metre)
    if dataset == "nyuv2":
        for path, array in ((image_path, image), (depth_path, depth)):
            if array.shape[:2] != _NYUV2_SIZE:
                raise ValueError(
                    f"{path} has {array.shape[0]} x {array.shape[1]} pixels, NYUv2 has 480 x 640; "
                    "data of other sizes are read by --dataset folder"
                )
        image, depth = image[_NYUV2_KEPT], depth[_NYUV2_KEPT]
    return image, depth


def open_split(
    dataset: str,
    root: str,
    split: str,
    split_file: str | None,
    crop_size: int | None,
    units_per_metre: float | None,
) -> Pairs:
    """The items of a split.

    Args:
        dataset: a key of `RULES`.
        root: folder of the data.
        split: "train" or "val".
        split_file: list of pairs instead of the rule.
        crop_size: side of random crops, mirrored half of the time; None leaves items whole.
        units_per_metre: PNG values per metre; None = what the data set uses, 1000 for folders.

    Raises:
        FileNotFoundError, ValueError: see `pairs.list_pairs`.
    """
    pairs, complaint = list_pairs(root, split, split_file, RULES[dataset], COUNTS[dataset][split])
    units = units_per_metre or PNG_UNITS_PER_METRE.get(dataset, 1000.0)
    read = partial(read_pair, dataset=dataset, units_per_metre=units)
    augment = partial(crop_and_flip, size=crop_size, fill=0) if crop_size else None
    return Pairs(Path(root), pairs, complaint, read, augment)
