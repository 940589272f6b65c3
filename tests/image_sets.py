"""Small image sets for the tests of `pixio.data` and `pixio.images`: tars, folders, statistics, damage."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_tar
from PIL import Image

from pixio.data import Loader, Stream, open_stream

# Images of one color, which a crop keeps: the color is the image's number.


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number >> 8, number & 255, 77)).save(buffer, "png")
    return buffer.getvalue()


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    pixels = batch["images"][:, :, 0, 0].long()  # [B, 3]
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def write_tars(root: Path, sizes: list[int], name: str = "set-train-{:03d}.tar") -> Path:
    """Tars with so many images each, numbered through, in the layout of the ImageNet tars."""
    first = 0
    for i, size in enumerate(sizes):
        members = {}
        for number in range(first, first + size):
            members |= {f"{number:05d}.png": png(number), f"{number:05d}.cls": b"3"}
        write_tar(root / name.format(i), members)
        first += size
    return root


def write_web(root: Path, records: list[dict], per_tar: int = 50) -> tuple[str, str]:
    """Web tars in two folders and their statistics; image i has record i, or none where that is None."""
    for i in range(0, len(records), per_tar):
        folder, stem = f"part{i // per_tar % 2}", f"{i // per_tar:04d}"
        chunk = range(i, min(i + per_tar, len(records)))
        write_tar(root / "tars" / folder / f"{stem}.tar", {f"{n:05d}.jpeg": png(n) for n in chunk})
        (root / "stats" / folder).mkdir(parents=True, exist_ok=True)
        statistics = {f"{n:05d}.jpeg": records[n] for n in chunk if records[n] is not None}
        (root / "stats" / folder / f"{stem}.json").write_text(json.dumps(statistics))
    return str(root / "tars"), str(root / "stats")


def good(**changes) -> dict:
    return {"histogram_score": 6.0, "mae_loss": 0.5, "width": 400, "height": 400} | changes


def stream_of(root: Path, batch_size: int = 4, **options) -> Stream:
    return open_stream("imagenet", str(root), size=4, batch_size=batch_size, **options)


def take(loader: Loader, batches: int) -> list[list[int]]:
    return [numbers(batch) for batch in islice(loader, batches)]


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        with tarfile.open(path) as tar:
            images = [member for member in tar.getmembers() if member.name.endswith(".png")]
            path.write_bytes(data[: images[-1].offset_data + 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "not a tar":
        path.write_bytes(b"<html>404</html>" * 200)
    elif how == "broken header":
        with tarfile.open(path) as tar:
            offset = tar.getmembers()[3].offset
        path.write_bytes(data[:offset] + b"\xa5" * 512 + data[offset + 512 :])
    elif how == "no image":
        write_tar(path, {"a.txt": b"hello"})
    elif how == "negative size":
        size = (-1024).to_bytes(12, "big", signed=True)
        header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
        header[124:136] = size
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
        path.write_bytes(bytes(header) + data)
    elif how == "huge size":
        info = tarfile.TarInfo("a.png")
        info.size = 1 << 50
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    elif how == "huge name":
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 50
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + data)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photographs() -> dict[str, Image.Image]:
    data = pytest.importorskip("skimage.data")
    names = ("astronaut", "camera", "chelsea", "coffee", "rocket")
    return {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in names}
