"""Images per second and core: this loader against the plain path, on the same tars, in one run.

    python benchmarks/loader.py                     photographs of scikit-image, resampled to three sizes
    python benchmarks/loader.py --photos DIR        photographs of one's own (jpg, png) instead

The plain path is what a short script does: webdataset, Pillow, torchvision's RandomResizedCrop (bicubic),
ToTensor, Normalize, default collation. It ends in float32 batches; ours ends in uint8 batches, which the
device normalizes, at next to no cost on a GPU. Both read 256-pixel crops in this process, and processor time
is counted, so that other work on the machine does not disturb the ratio. Decoding whole images alone, the
floor of a loader without partial decoding, is printed beside.
"""

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from pixio.data import Loader, open_stream
from pixio.images.normalization import IMAGENET_MEAN, IMAGENET_STD

# width, height in pixels; images; ratio to reach
SIZES = ((500, 375, 192, 3.0), (1024, 768, 96, 3.0), (2048, 1536, 48, 5.0))
CROP, BATCH, ROUNDS = 256, 24, 4
SUFFIXES = (".jpg", ".jpeg", ".png")


def load_photos(folder: Path | None) -> list[Image.Image]:
    """Up to 24 photographs, RGB."""
    if folder:
        files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
        return [Image.open(path).convert("RGB") for path in files[:24]]
    from skimage import data

    return [Image.fromarray(load()) for load in (data.astronaut, data.chelsea, data.coffee, data.rocket)]


def encode(photos: list[Image.Image], size: tuple[int, int], count: int, quality: int) -> list[bytes]:
    """The photographs in turn as JPEGs of one size."""
    images = []
    for i in range(count):
        buffer = io.BytesIO()
        photos[i % len(photos)].resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
        images.append(buffer.getvalue())
    return images


def write_tar(path: Path, images: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(images):
            info = tarfile.TarInfo(f"{i:05d}.jpg")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))


def read_plainly(tar: Path) -> None:
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(CROP, (0.2, 1.0), interpolation=bicubic)
    scale = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    transform = transforms.Compose([crop, transforms.ToTensor(), scale])
    samples = webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False).decode("pil")
    for _ in DataLoader(samples.to_tuple("jpg").map_tuple(transform), batch_size=BATCH):
        pass


def read_ours(tar: Path, count: int, decode: str) -> None:
    loader = Loader(open_stream("webdataset", str(tar), size=CROP, batch_size=BATCH, decode=decode))
    for _ in islice(loader, count // BATCH):
        pass


def decode_only(images: list[bytes]) -> None:
    for image in images:
        simplejpeg.decode_jpeg(image)


def measure(count: int, ways: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Images per second of processor time, the best of several rounds."""
    speed = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):  # in turns, so that all meet the same machine
        for name, read in ways.items():
            start = time.process_time()
            read()
            speed[name] = max(speed[name], count / (time.process_time() - start))
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, help="folder of photographs; by default those of scikit-image")
    parser.add_argument("--quality", type=int, default=75, help="of the JPEGs (75 is Pillow's default)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    photos = load_photos(options.photos)
    print(f"images/s per core, {CROP}-pixel crops, JPEG quality {options.quality}")
    print(
        f"{'size':>11}{'bits/px':>9}{'plain':>8}{'exact':>8}{'ours':>8}{'ratio':>8}{'wanted':>8}{'floor':>8}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for width, height, count, wanted in SIZES:
            images = encode(photos, (width, height), count, options.quality)
            tar = Path(folder) / f"{width}.tar"
            write_tar(tar, images)
            bits = 8 * sum(map(len, images)) / (count * width * height)
            speed = measure(
                count,
                {
                    "plain": partial(read_plainly, tar),
                    "exact": partial(read_ours, tar, count, "exact"),
                    "ours": partial(read_ours, tar, count, "fast"),
                    "floor": partial(decode_only, images),
                },
            )
            columns = "".join(f"{speed[name]:8.0f}" for name in ("plain", "exact", "ours"))
            ratio = f"{speed['ours'] / speed['plain']:7.1f}x{wanted:7.1f}x"
            print(f"{f'{width} x {height}':>11}{bits:9.2f}{columns}{ratio}{speed['floor']:8.0f}", flush=True)


if __name__ == "__main__":
    main()
