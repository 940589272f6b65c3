"""Depth data sets: NYUv2, KITTI (Eigen split), and folders of your own. Depth in meters, 0 = not measured."""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from dense.data import DataSource, NothingScoredError, Rasters, crop_and_flip, open_photo
from dense.listing import Listing, Pair, list_below, list_existing, list_folder
from torch import Tensor

from pixio.images.targets import open_depth

PUBLISHED = {"nyuv2": {"train": 24_231, "val": 654}, "kitti": {"train": 23_158, "val": 652}}
UNITS_PER_METER = {"nyuv2": 1000.0, "kitti": 256.0, "folder": 1000.0}  # of PNGs
_COMMON_UNITS = (1000.0, 100.0, 5000.0, 256.0, 10_000.0, 1.0)
# where the lists of BTS start
FOLDERS = {"nyuv2": ("sync/", "official_splits/test/"), "kitti": ("images/", "annotations/")}

_NYUV2_SIZE = (480, 640)
_NYUV2_KEPT = (41, 45, 560, 426)  # without the white frame: columns 41-600, rows 45-470
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


def open_depth_pair(
    image_path: Path, depth_path: Path, dataset: str, units_per_meter: float, upright: bool
) -> Rasters:
    """Image uint8 [H, W, 3] and depth float32 [H, W], for NYUv2 without the frame around both."""
    image, depth = open_photo(image_path, upright), open_depth(depth_path, units_per_meter)
    if dataset == "nyuv2":
        for path, raster in ((image_path, image), (depth_path, depth)):
            if (raster.height, raster.width) != _NYUV2_SIZE:
                raise ValueError(
                    f"{path} has {raster.height} x {raster.width} pixels, NYUv2 has 480 x 640; "
                    "data of other sizes are read by --dataset folder"
                )
        image, depth = image.inside(_NYUV2_KEPT), depth.inside(_NYUV2_KEPT)
    return image, depth


def inspect_depth(
    depths: Iterable[tuple[Path, Tensor]], min_depth: float, max_depth: float, units_per_meter: float
) -> str:
    """What is odd about depth files [H, W] in meters, or nothing: a wrong unit, most likely.

    Raises:
        NothingScoredError: no pixel of them counts.
    """
    rows = []  # file, pixels that count, pixels measured, nearest and farthest of these
    for path, depth in depths:
        known = depth[depth > 0]
        counting = ((known >= min_depth) & (known <= max_depth)).sum().item()
        limits = [limit.item() for limit in known.aminmax()] if len(known) else [0.0, 0.0]
        rows.append((path, counting, len(known), *limits))
    path, _, _, near, far = max(rows, key=lambda row: row[-1])
    if far == 0:
        raise NothingScoredError(
            f"no depth is measured in {len(rows)} files such as {path}: all is 0, unknown"
        )
    limits = f"--min_depth {min_depth:g}, --max_depth {max_depth:g}"
    remedy = _unit_remedy(path, far, max_depth, units_per_meter)
    found = f"{path} holds {near:.4g} to {far:.4g} m ({limits}): {remedy}"
    counting, measured = (sum(row[i] for row in rows) for i in (1, 2))
    if not counting:
        raise NothingScoredError(f"no pixel of {len(rows)} depth files counts: {found}")
    if counting < measured / 2:
        return f"{1 - counting / measured:.0%} of the depth in {len(rows)} files does not count: {found}"
    if far < max_depth / 10:
        return f"all depth lies far below the limit: {found}"
    empty = [str(row[0]) for row in rows if not row[1]]
    return f"no pixel of {len(empty)} of {len(rows)} depth files counts, such as {empty[0]}" if empty else ""


def _unit_remedy(path: Path, far: float, max_depth: float, units_per_meter: float) -> str:
    if path.suffix.lower() == ".npy":
        return ".npy files are in meters"
    stored = far * units_per_meter
    likely = [units for units in _COMMON_UNITS if max_depth / 10 < stored / units <= max_depth]
    other = f", with {likely[0]:g} the farthest would be {stored / likely[0]:.4g} m" if likely else ""
    return f"--depth_scale is the number of PNG values per meter, {units_per_meter:g} now{other}"


def depth_source(
    dataset: str, min_depth: float, max_depth: float, units_per_meter: float | None, upright: bool
) -> DataSource:
    """A depth data set; its training crops are mirrored half of the time.

    Args:
        dataset: a key of `RULES`.
        min_depth, max_depth: range of depths that count, meters.
        units_per_meter: PNG values per meter; None = what the data set uses, 1000 for folders.
        upright: turn images as EXIF says.
    """
    units = units_per_meter or UNITS_PER_METER[dataset]
    return DataSource(
        list_split=RULES[dataset],
        published=PUBLISHED.get(dataset, {}),
        open=partial(open_depth_pair, dataset=dataset, units_per_meter=units, upright=upright),
        crop=partial(crop_and_flip, fill=0),
        inspect=partial(inspect_depth, min_depth=min_depth, max_depth=max_depth, units_per_meter=units),
        folders=FOLDERS.get(dataset, ()),
    )
