"""Depth data sets: NYUv2, KITTI (Eigen split), and folders of your own. Depth in meters, 0 = not measured."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dense.data import Arrays, DataSource, crop_and_flip, read_photo
from dense.listing import Listing, Pair, list_below, list_existing, list_folder

from pixio.images.targets import read_depth

PUBLISHED = {"nyuv2": {"train": 24_231, "val": 654}, "kitti": {"train": 23_158, "val": 652}}
UNITS_PER_METER = {"nyuv2": 1000.0, "kitti": 256.0, "folder": 1000.0}  # of PNGs

_NYUV2_SIZE = (480, 640)
_NYUV2_KEPT = (slice(45, 471), slice(41, 601))  # without the white frame: rows 45-470, columns 41-600
_EIGEN = Path(__file__).with_name("kitti_eigen.txt")


def list_nyuv2(root: Path, split: str) -> Listing:
    """Every `rgb_*.jpg` with its `sync_depth_*.png`, in the folders of the split."""
    folder = "sync" if split == "train" else "official_splits/test"
    photos = (re.fullmatch(rf"({folder}/[^/]+)/rgb_([^/]*)\.jpg", path) for path in list_below(root, folder))
    return list_existing(
        root, [Pair(photo[0], f"{photo[1]}/sync_depth_{photo[2]}.png") for photo in photos if photo]
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


RULES = {
    "nyuv2": list_nyuv2,
    "kitti": list_kitti,
    "folder": partial(list_folder, targets="depth", suffixes=(".png", ".npy")),
}


def read_depth_pair(image_path: Path, depth_path: Path, dataset: str, units_per_meter: float) -> Arrays:
    """Image uint8 [H, W, 3] and depth float32 [H, W], for NYUv2 without the frame around both."""
    image, depth = read_photo(image_path), read_depth(depth_path, units_per_meter)
    if dataset == "nyuv2":
        for path, array in ((image_path, image), (depth_path, depth)):
            if array.shape[:2] != _NYUV2_SIZE:
                raise ValueError(
                    f"{path} has {array.shape[0]} x {array.shape[1]} pixels, NYUv2 has 480 x 640; "
                    "data of other sizes are read by --dataset folder"
                )
        image, depth = image[_NYUV2_KEPT], depth[_NYUV2_KEPT]
    return image, depth


def depth_source(dataset: str, units_per_meter: float | None = None) -> DataSource:
    """A depth data set; its training crops are mirrored half of the time.

    Args:
        dataset: a key of `RULES`.
        units_per_meter: PNG values per meter; None = what the data set uses, 1000 for folders.
    """
    units = units_per_meter or UNITS_PER_METER[dataset]
    read = partial(read_depth_pair, dataset=dataset, units_per_meter=units)
    return DataSource(RULES[dataset], PUBLISHED.get(dataset, {}), read, partial(crop_and_flip, fill=0))
