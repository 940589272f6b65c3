"""Training crops per second and core for depth and segmentation: our loader against the plain path.

    PYTHONPATH=evaluation python benchmarks/dense_loader.py   photographs of scikit-image in the sets' formats
    … --photos DIR                                              photographs of one's own (jpg, png) instead

The plain path is what a short script does: Pillow decodes, the whole image is scaled where the protocol says
so, then cropped, mirrored, made float32 and normalized. Ours ends in uint8 crops, which the device
normalizes. Both read 256-pixel crops of the same files in this process, and processor time is counted, so
that other work on the machine does not disturb the ratio. The files have the formats and sizes of the data
sets (Pascal VOC and ADE20K vary around theirs); masks and depth are made up.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dense.data import DataSource, PairDataset
from dense.listing import Pair
from loader import load_photos
from monodepth.data import depth_source
from PIL import Image
from semseg.data import mask_source
from torchvision.transforms import v2

from pixio.engine.config import option, parse
from pixio.images.normalization import IMAGENET_MEAN, IMAGENET_STD

CROP, ROUNDS = 256, 3
# width, height, suffix of images, whether scaled, ratio to reach
SETS = {
    "nyuv2": (640, 480, "jpg", False, 1.5),
    "kitti": (1242, 375, "png", False, 1.5),
    "ade20k": (683, 512, "jpg", True, 5.0),
    "pascal": (500, 375, "jpg", True, None),
    "loveda": (1024, 1024, "png", True, 5.0),
}


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time the loader of dense evaluation against the plain path."""

    photos: Path | None = option(None, "folder of photographs; by default those of scikit-image")
    sets: tuple[str, ...] = option(tuple(SETS), "data sets whose formats are timed")
    items: int = option(24, "files of each set", ge=1)
    quality: int = option(90, "JPEG quality", ge=1, le=100)


def write_set(name: str, root: Path, config: BenchmarkConfig, photos: list[Image.Image]) -> list[Pair]:
    """Images and targets in the format of a data set."""
    width, height, suffix, scaled, _ = SETS[name]
    rng, pairs = np.random.default_rng(0), []
    for i in range(config.items):
        pairs.append(Pair(f"{i}.{suffix}", f"{i}_target.png"))
        pixels = np.asarray(photos[i % len(photos)].resize((width, height), Image.Resampling.BICUBIC), float)
        pixels = (pixels + rng.normal(0, 2, pixels.shape)).clip(0, 255).astype(np.uint8)  # a sensor's noise
        options = {"quality": config.quality} if suffix == "jpg" else {}
        Image.fromarray(pixels).save(root / pairs[-1].image, **options)
        regions = Image.fromarray(rng.integers(0, 255, (24, 32), np.uint8))
        if scaled:
            values = np.asarray(regions.resize((width, height), Image.Resampling.NEAREST)) // 40
        else:
            far = np.asarray(regions.resize((width, height), Image.Resampling.BICUBIC))
            values = (far * 60.0 + rng.integers(0, 60, far.shape)).astype(np.uint16)
            if name == "kitti":  # points of a lidar
                values[rng.random(values.shape) > 0.16] = 0
        Image.fromarray(values).save(root / pairs[-1].target)
    return pairs


def read_plainly(name: str, root: Path, pair: Pair, rng: np.random.Generator) -> tuple:
    """An item of the plain path: whole image, then the crop."""
    image, target = Image.open(root / pair.image).convert("RGB"), Image.open(root / pair.target)
    if name == "nyuv2":
        image, target = (whole.crop((41, 45, 601, 471)) for whole in (image, target))
    if SETS[name][3]:
        longer = max(image.size)
        new = int(rng.integers(longer // 2, 2 * longer + 1))
        size = tuple(max(round(side * new / longer), 1) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        target = target.resize(size, Image.Resampling.NEAREST)
    image, target = np.array(image), np.array(target)
    if not SETS[name][3]:
        target = (target / (256 if name == "kitti" else 1000)).astype(np.float32)
    right, below = (max(CROP - side, 0) for side in (target.shape[1], target.shape[0]))
    if right or below:
        image = np.pad(image, ((0, below), (0, right), (0, 0)))
        target = np.pad(target, ((0, below), (0, right)), constant_values=255)
    top, left = (int(rng.integers(side - CROP + 1)) for side in target.shape)
    image, target = (array[top : top + CROP, left : left + CROP] for array in (image, target))
    if rng.random() < 0.5:
        image, target = image[:, ::-1], target[:, ::-1]
    scale = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return scale(pixels), torch.from_numpy(np.ascontiguousarray(target))


def source_of(name: str) -> DataSource:
    """The data set as the evaluation programs read it."""
    if name in ("nyuv2", "kitti"):
        return depth_source(name, 0.001, 80.0, None, upright=False)
    return mask_source(name, 150, reduce_zero_label=False, upright=False)


def measure(items: int, ways: dict[str, Callable[[int], object]]) -> dict[str, float]:
    """Items per second of processor time, the best of several rounds."""
    speed = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):  # in turns, so that all meet the same machine
        for name, read in ways.items():
            start = time.process_time()
            for i in range(items):
                read(i)
            speed[name] = max(speed[name], items / (time.process_time() - start))
    return speed


def main(argv: list[str] | None = None) -> None:
    config = parse(BenchmarkConfig, argv)
    torch.set_num_threads(1)
    photos = load_photos(config.photos)
    print(f"training items/s per core, {CROP}-pixel crops, JPEG quality {config.quality}")
    print(f"{'set':>8}{'size':>12}{'file':>6}{'plain':>8}{'ours':>8}{'ratio':>8}{'wanted':>8}")
    for name in config.sets:
        width, height, suffix, _, wanted = SETS[name]
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            pairs, source = write_set(name, root, config, photos), source_of(name)
            ours = PairDataset(root, pairs, source.open, lambda *cut, crop=source.crop: crop(*cut, size=CROP))
            ways = {
                "plain": lambda i, name=name, root=root, pairs=pairs: read_plainly(
                    name, root, pairs[i], np.random.default_rng((0, i))
                ),
                "ours": lambda i, ours=ours: ours[i, 0, i],
            }
            speed = measure(len(pairs), ways)
        ratio = f"{speed['ours'] / speed['plain']:7.1f}x{f'{wanted:.1f}x' if wanted else '':>8}"
        files = f"{name:>8}{f'{width} x {height}':>12}{suffix:>6}"
        print(f"{files}{speed['plain']:8.1f}{speed['ours']:8.1f}{ratio}", flush=True)


if __name__ == "__main__":
    main()
