"""How public data sets lie on disk, and what a rendered scene is in them: file names, bit depths, units."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from pixio.synthetic.scenes import LABEL_NAMES, Scene, label_of, render

KITTI_DEPTH_SCALE = 8  # scenes reach 10 m, KITTI 80 m: rendered meters are multiplied by this

# Values in the label files for the classes in the order of CLASS_NAMES, and last for unscored pixels.
ADE20K_VALUES = np.array([5, 0, 3, 41, 119, 42, 36, 255], np.uint8)  # its own, with ball, column and lamp
PASCAL_VALUES = np.array([0, 0, 0, 20, 4, 5, 16, 255], np.uint8)  # the room is background
LOVEDA_VALUES = np.array([1, 2, 3, 4, 5, 6, 7, 0], np.uint8)

SPLITS = ("train", "val")
SEEDS_PER_SPLIT = 1 << 32  # a multiple of the number of labels: every split starts at the first
_NYUV2_SIZE = (480, 640)  # height, width
_KITTI_SIZE = (375, 1242)
_FILES_PER_FOLDER = 100  # frames of a NYUv2 scene, tars of a web folder

# Part of the Eigen split, enough for small trees: drive -> runs of frames, first, last, step.
_KITTI_RUNS = {
    "train": {
        "2011_09_26_drive_0001": [(5, 102, 1)],
        "2011_09_26_drive_0005": [(5, 148, 1)],
        "2011_10_03_drive_0034": [(5, 4657, 1)],
    },
    "val": {
        "2011_09_26_drive_0002": [(6, 63, 3)],
        "2011_09_26_drive_0009": [(16, 176, 16), (196, 388, 16)],
        "2011_09_26_drive_0029": [(14, 196, 14), (296, 408, 14)],
        "2011_09_26_drive_0036": [(32, 704, 32)],
        "2011_09_26_drive_0046": [(5, 115, 5)],
        "2011_09_26_drive_0048": [(5, 16, 1)],
    },
}
_KITTI_FRAMES = {
    split: [
        (drive, frame)
        for drive, runs in drives.items()
        for first, last, step in runs
        for frame in range(first, last + 1, step)
    ]
    for split, drives in _KITTI_RUNS.items()
}

# First number of each half of LoveDA; items alternate between the two.
_LOVEDA_FIRST = {"train": {"Rural": 0, "Urban": 1366}, "val": {"Rural": 2522, "Urban": 3514}}


@dataclass(frozen=True)
class Group:
    """Items that become files together: one image with its labels, or the images of one tar."""

    split: str
    number: int  # of the group within its split
    seeds: range
    size: int

    @property
    def seed(self) -> int:
        return self.seeds[0]


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk.

    Attributes:
        paths: names of a group's files, relative to the root.
        contents: their bytes, in the same order.
        in_tars: whether a group is a tar of many images rather than one image.
        capacity: most items of each split that the names allow.
        lists: further files about the whole tree, name -> text, from all its groups.
    """

    paths: Callable[[Group], tuple[str, ...]]
    contents: Callable[[Group], tuple[bytes, ...]]
    in_tars: bool = False
    capacity: tuple[int, int] = (SEEDS_PER_SPLIT, SEEDS_PER_SPLIT)
    lists: Callable[[list[Group]], dict[str, str]] = lambda groups: {}


# --------------------------------------------------------------------------- pixels to bytes


def _scene(group: Group, resolution: tuple[int, int] | None = None) -> Scene:
    """Render a group's only scene, resampled to (height, width) where the layout has its own resolution."""
    if resolution is None:
        return render(group.seed, group.size)
    height, width = resolution
    scene = render(group.seed, (group.size, round(group.size * width / height)))

    def resample(array: np.ndarray, method: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize((width, height), method))

    return Scene(
        image=resample(scene.image, Image.Resampling.BICUBIC),
        depth=resample(scene.depth, Image.Resampling.NEAREST),
        semantics=resample(scene.semantics, Image.Resampling.NEAREST),
        label=scene.label,
    )


def _jpeg(image: np.ndarray) -> bytes:
    return _encode(image, "JPEG", quality=95)


def _png(image: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3], or uint16 [H, W] at its full depth."""
    return _encode(image, "PNG", compress_level=1)


def _encode(image: np.ndarray, image_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, image_format, **options)
    return buffer.getvalue()


def _millimeters(scene: Scene) -> np.ndarray:
    return np.rint(scene.depth * 1000).astype(np.uint16)


def _sparse_depth(depth: np.ndarray, seed: int) -> np.ndarray:
    """Meters x 256, and 0 where a laser would see nothing: the upper third and 55 % of the rest."""
    values = np.rint(depth * (KITTI_DEPTH_SCALE * 256)).astype(np.uint16)
    values[np.random.default_rng([2, seed]).random(depth.shape) < 0.55] = 0
    values[: len(values) // 3] = 0
    return values


def _labels(semantics: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Scene classes in a data set's values; pixels on both sides of a class boundary become unscored."""
    border = np.zeros(semantics.shape, bool)
    beside, below = semantics[:, 1:] != semantics[:, :-1], semantics[1:] != semantics[:-1]
    border[:, 1:] |= beside
    border[:, :-1] |= beside
    border[1:] |= below
    border[:-1] |= below
    return np.where(border, values[-1], values[semantics])


def _tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar whose bytes depend on nothing but its members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)  # time 0, owner 0
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


# --------------------------------------------------------------------------- the layouts


def _imagenet_tar_paths(group: Group) -> tuple[str, ...]:
    name = f"train-{group.number:04d}" if group.split == "train" else f"validation-{group.number:02d}"
    return (f"imagenet1k-{name}.tar",)


def _imagenet_tar_contents(group: Group) -> tuple[bytes, ...]:
    members = []
    for seed in group.seeds:
        scene = render(seed, group.size)
        key = f"{LABEL_NAMES[scene.label]}_{seed % SEEDS_PER_SPLIT:08d}"
        about = {"filename": f"{key}.jpg", "label": scene.label, "width": group.size, "height": group.size}
        members.append((f"{key}.jpg", _jpeg(scene.image)))
        members.append((f"{key}.cls", str(scene.label).encode()))
        members.append((f"{key}.json", json.dumps(about).encode()))
    return (_tar(members),)


def _imagenet_tar_lists(groups: list[Group]) -> dict[str, str]:
    return {"_info.json": _tar_info([(group, _imagenet_tar_paths(group)[0]) for group in groups])}


def _web_tar_paths(group: Group) -> tuple[str, ...]:
    folder, number = divmod(group.number, _FILES_PER_FOLDER)
    return f"tars/{folder:04d}/{number}.tar", f"stats/{folder:04d}/{number}.json"


def _web_tar_contents(group: Group) -> tuple[bytes, ...]:
    names = {seed: f"{seed % SEEDS_PER_SPLIT:09d}.jpeg" for seed in group.seeds}
    statistics = {}
    for seed, name in names.items():
        rng = np.random.default_rng([2, seed])  # plausible scores, measured on nothing
        score, loss = round(rng.uniform(3.5, 7.5), 4), round(rng.uniform(0.1, 1.2), 4)
        sides = {"width": group.size, "height": group.size}
        statistics[name] = {"histogram_score": score, "mae_loss": loss} | sides
    images = ((name, _jpeg(render(seed, group.size).image)) for seed, name in names.items())
    return _tar(images), json.dumps(statistics).encode()


def _web_tar_lists(groups: list[Group]) -> dict[str, str]:
    tars = [(group, _web_tar_paths(group)[0].removeprefix("tars/")) for group in groups]
    return {"tars/_info.json": _tar_info(tars)}


def _tar_info(tars: list[tuple[Group, str]]) -> str:
    """What timm's reader of tars asks for: the tars of each split, and how many images each holds."""
    splits = {}
    for split, name in zip(SPLITS, ("train", "validation"), strict=True):
        lengths = {path: len(group.seeds) for group, path in tars if group.split == split}
        if lengths:
            splits[name] = {
                "name": name,
                "num_samples": sum(lengths.values()),
                "filenames": list(lengths),
                "shard_lengths": list(lengths.values()),
            }
    return json.dumps({"splits": splits}, indent=2) + "\n"


def _imagenet_folder_paths(group: Group) -> tuple[str, ...]:
    return (f"{group.split}/{LABEL_NAMES[label_of(group.seed)]}/{group.split}_{group.number:08d}.JPEG",)


def _imagenet_folder_contents(group: Group) -> tuple[bytes, ...]:
    return (_jpeg(_scene(group).image),)


def _nyuv2_paths(group: Group) -> tuple[str, ...]:
    place, frame = divmod(group.number, _FILES_PER_FOLDER)
    folder = f"{'sync' if group.split == 'train' else 'official_splits/test'}/room_{place:04d}"
    return f"{folder}/rgb_{frame:05d}.jpg", f"{folder}/sync_depth_{frame:05d}.png"


def _nyuv2_contents(group: Group) -> tuple[bytes, ...]:
    scene = _scene(group, _NYUV2_SIZE)
    return _jpeg(scene.image), _png(_millimeters(scene))


def _folder_paths(group: Group) -> tuple[str, ...]:
    return tuple(f"{group.split}/{kind}/{group.number:06d}.png" for kind in ("images", "depth", "masks"))


def _folder_contents(group: Group) -> tuple[bytes, ...]:
    scene = _scene(group)
    return _png(scene.image), _png(_millimeters(scene)), _png(scene.semantics)


def _kitti_paths(group: Group) -> tuple[str, ...]:
    drive, frame = _KITTI_FRAMES[group.split][group.number]
    return (
        f"images/{drive[:10]}/{drive}_sync/image_02/data/{frame:010d}.png",
        f"annotations/{drive}_sync/proj_depth/groundtruth/image_02/{frame:010d}.png",
    )


def _kitti_contents(group: Group) -> tuple[bytes, ...]:
    scene = _scene(group, _KITTI_SIZE)
    return _png(scene.image), _png(_sparse_depth(scene.depth, group.seed))


def _ade20k_paths(group: Group) -> tuple[str, ...]:
    folder = {"train": "training", "val": "validation"}[group.split]
    name = f"{folder}/ADE_{group.split}_{group.number + 1:08d}"
    return f"images/{name}.jpg", f"annotations/{name}.png"


def _pascal_name(group: Group) -> str:
    return f"{'2008' if group.split == 'train' else '2009'}_{group.number:06d}"


def _pascal_paths(group: Group) -> tuple[str, ...]:
    return f"JPEGImages/{_pascal_name(group)}.jpg", f"SegmentationClass/{_pascal_name(group)}.png"


def _pascal_lists(groups: list[Group]) -> dict[str, str]:
    return {
        f"ImageSets/Segmentation/{split}.txt": "".join(
            f"{_pascal_name(group)}\n" for group in groups if group.split == split
        )
        for split in SPLITS
    }


def _loveda_paths(group: Group) -> tuple[str, ...]:
    number, odd = divmod(group.number, 2)
    half = ("Rural", "Urban")[odd]
    folder = f"{group.split.title()}/{group.split.title()}/{half}"
    name = f"{_LOVEDA_FIRST[group.split][half] + number}.png"
    return f"{folder}/images_png/{name}", f"{folder}/masks_png/{name}"


def _with_mask(values: np.ndarray, encode: Callable[[np.ndarray], bytes], group: Group) -> tuple[bytes, ...]:
    scene = _scene(group)
    return encode(scene.image), _png(_labels(scene.semantics, values))


_KITTI_CAPACITY = (len(_KITTI_FRAMES["train"]), len(_KITTI_FRAMES["val"]))
LAYOUTS = {
    "imagenet-tars": Layout(_imagenet_tar_paths, _imagenet_tar_contents, True, lists=_imagenet_tar_lists),
    "web-tars": Layout(
        _web_tar_paths, _web_tar_contents, True, capacity=(SEEDS_PER_SPLIT, 0), lists=_web_tar_lists
    ),
    "imagenet-folders": Layout(_imagenet_folder_paths, _imagenet_folder_contents),
    "nyuv2": Layout(_nyuv2_paths, _nyuv2_contents),
    "kitti": Layout(_kitti_paths, _kitti_contents, capacity=_KITTI_CAPACITY),
    "ade20k": Layout(_ade20k_paths, partial(_with_mask, ADE20K_VALUES, _jpeg)),
    "pascal": Layout(_pascal_paths, partial(_with_mask, PASCAL_VALUES, _jpeg), lists=_pascal_lists),
    "loveda": Layout(_loveda_paths, partial(_with_mask, LOVEDA_VALUES, _png), capacity=(2 * 1156, 2 * 677)),
    "folder": Layout(_folder_paths, _folder_contents),
}
