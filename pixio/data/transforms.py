"""From encoded bytes to uint8 crops, and from uint8 crops to the encoder's input.

Shapes: B images, H rows, W columns, S side of a square crop. Crops stay uint8 until `normalise`, which runs
where the batch is, so that workers ship a quarter of the bytes.
"""

import functools
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pixio.data import jpeg
from pixio.inputs import to_tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Box = tuple[int, int, int, int]  # left, top, width, height, in pixels

MAX_PIXELS = 89_478_485  # Pillow's own warning level: a quarter of a GiB once decoded to RGB
FORMATS = ("JPEG", "PNG", "WEBP")  # nothing else is worth handing hostile bytes to

# Decoding at a fraction of the resolution aliases otherwise than the bicubic filter does. How much that shows
# depends on how much larger than the crop the reduced image is, and on the detail in the photograph, of which
# its bits per pixel tell. Below so many bits -> least ratio with which the mean difference stays below 2 of
# 255 levels (in more than 99 of 100 crops of ImageNet photographs, at any scale; typically it is 0.5).
_REDUCTION_MARGINS = ((1.0, 1.0), (1.5, 1.5), (math.inf, 2.5))

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DamagedDataError(ValueError):
    """Data that cannot be read: the streams skip, count and report it."""


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet mean and standard deviation on the 0-255 scale, each [3, 1, 1], kept per device."""
    mean, std = (torch.tensor(values, device=device) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean[:, None, None], std[:, None, None]


def normalise(images: Tensor) -> Tensor:
    """Shift and scale pixels by the ImageNet statistics, on the device the images are on.

    Args:
        images: uint8 [B, 3, H, W] or [3, H, W], RGB, 0-255.

    Returns:
        float32, same shape, contiguous: (pixel / 255 - mean) / std.

    Raises:
        ValueError: the images are not uint8 (already normalised, or on another scale).
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"normalise expects uint8 pixels (0-255), found {images.dtype}: pass crops as read")
    mean, std = _statistics(images.device)
    return (images.to(torch.float32, memory_format=torch.contiguous_format) - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """Undo `normalise`: float [B, 3, H, W] or [3, H, W] -> uint8, rounded and clipped to 0-255."""
    mean, std = _statistics(images.device)
    return (images.float() * std + mean).round().clamp(0, 255).to(torch.uint8)


def decode(data: bytes, upright: bool = True) -> Image.Image:
    """Decode a JPEG, PNG or WebP of any colour mode.

    Greyscale, palette and CMYK become RGB, 16-bit grey keeps its upper byte, transparency is laid over
    white, animations give their first frame. The size is checked in the header, before any pixel is decoded.

    Args:
        data: the encoded image.
        upright: turn it as its EXIF data say; else the pixels stay where they are stored.

    Returns:
        RGB image, 8 bits per channel.

    Raises:
        DamagedDataError: not an image of these formats, damaged, truncated, or above MAX_PIXELS.
    """

    def rgb(image: Image.Image) -> Image.Image:
        turn = _UPRIGHT.get(_orientation(image.info.get("exif"))) if upright else None
        image = to_rgb(image)
        return image.transpose(turn) if turn is not None else image

    return _open(data, rgb)


def read_size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image as `decode` returns it, in pixels, from its header alone.

    Raises:
        DamagedDataError: not an image of these formats, or above MAX_PIXELS.
    """

    def size(image: Image.Image) -> tuple[int, int]:
        sideways = _orientation(image.info.get("exif")) > 4
        return image.size[::-1] if sideways else image.size

    return _open(data, size)


def _open(data: bytes, use: Callable[[Image.Image], Any]) -> Any:
    """What `use` makes of an image whose header has been read and found acceptable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters raises
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_pixels(image.width, image.height)
            return use(image)
    except DamagedDataError:
        raise
    except UnidentifiedImageError as error:
        raise DamagedDataError(f"not a {' or '.join(FORMATS)} image ({len(data)} bytes)") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        raise DamagedDataError(f"{type(error).__name__}: {error}") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DamagedDataError(f"{width} x {height} is above {MAX_PIXELS} pixels")


def _orientation(exif: bytes | None) -> int:
    """How a camera was held, 1 (upright) to 8; 1 also where the metadata cannot be read."""
    if not exif:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags = Image.Exif()
            tags.load(exif)
            return int(tags.get(_EXIF_ORIENTATION, 1))
    except Exception:  # as hostile as the pixels, but worth no image
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, as `decode` says; it is loaded, but not turned."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw the box of a random resized crop, distributed as torchvision's RandomResizedCrop (Inception's).

    Ten attempts at an area uniform in `scale` and an aspect ratio log-uniform in `ratio`; after that the
    largest centred box whose aspect ratio is in range.

    Args:
        rng: source of randomness.
        width, height: size of the image in pixels.
        scale: range of the box's share of the image's area.
        ratio: range of the box's width / height.

    Returns:
        (left, top, box width, box height) in pixels, inside the image.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width + 1))
            top = int(rng.integers(height - box_height + 1))
            return left, top, box_width, box_height
    box_width = min(width, max(1, round(height * ratio[1])))
    box_height = min(height, max(1, round(width / ratio[0])))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def decode_crop(data: bytes, size: int, choose: Callable[[int, int], Box], exact: bool = False) -> Tensor:
    """Decode the part of an image inside a box and resize it to a square, bicubic and antialiased.

    JPEGs are decoded as far down and at as large a scale as the crop needs. A box in a JPEG that may be
    decoded at 1/2, 1/4 or 1/8 is rounded to whole pixels of that scale, in the exact way too: the two differ
    in arithmetic, by less than 2 of 255 levels in the mean.

    Args:
        data: the encoded image.
        size: side S of the result in pixels.
        choose: gives the box from the width and height of the upright image, as `crop_box` does.
        exact: decode the whole image at its full scale, and resize it with Pillow: the reference.

    Returns:
        uint8 [3, S, S], RGB.

    Raises:
        DamagedDataError: as `decode` does.
    """
    frame = jpeg.read_frame(data)
    if frame is None or _orientation(frame.exif) != 1:
        image = decode(data)
        return _resize_box(image, choose(*image.size), size, exact)
    _check_pixels(frame.width, frame.height)
    left, top, width, height = choose(frame.width, frame.height)
    bits = 8 * len(data) / (frame.width * frame.height)
    margin = next(margin for limit, margin in _REDUCTION_MARGINS if bits < limit)
    reduction = max(r for r in (1, 2, 4, 8) if r == 1 or min(width, height) >= r * margin * size)
    # in pixels of the reduced image; its last row and column may lie partly outside the original
    right = min(round((left + width) / reduction), frame.width // reduction)
    bottom = min(round((top + height) / reduction), frame.height // reduction)
    left, top = round(left / reduction), round(top / reduction)
    if not exact:
        rows = jpeg.decode_rows(data, frame, bottom * reduction, reduction)
        if rows is not None:
            return _resize(rows[top:bottom, left:right], size)
    box = (left, top, right - left, bottom - top)
    return _resize_box(decode(data), tuple(side * reduction for side in box), size, exact)


def random_resized_crop(
    image: Image.Image, rng: np.random.Generator, size: int, scale: tuple[float, float] = (0.2, 1.0)
) -> Tensor:
    """Cut the box of `crop_box` and resize it, bicubic and antialiased, in uint8.

    Args:
        image: RGB image.
        rng: source of randomness.
        size: side S of the result in pixels.
        scale: range of the crop's share of the image's area.

    Returns:
        uint8 [3, S, S].
    """
    return _resize_box(image, crop_box(rng, image.width, image.height, scale), size, exact=True)


def _resize_box(image: Image.Image, box: Box, size: int, exact: bool) -> Tensor:
    """The inside of a box as a square, uint8 [3, S, S]."""
    left, top, width, height = box
    # cropped first: `resize(box=...)` would let the filter reach pixels outside the box
    crop = image.crop((left, top, left + width, top + height))
    if exact:
        return to_tensor(crop.resize((size, size), Image.Resampling.BICUBIC))
    return _resize(np.array(crop), size)


def _resize(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] -> [3, S, S] with torch's vectorised kernel, channels last in memory all the way."""
    # the batch dimension comes first, or its stride would hide the memory format from the kernel
    image = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)  # [1, 3, H, W]
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True, align_corners=False)[0]


def resize_centre_crop(image: Image.Image, resize: int, crop: int) -> Tensor:
    """Resize the shorter side to `resize` (bicubic, antialiased), then cut the central square: for inference.

    Args:
        image: RGB image.
        resize: length of the shorter side after resizing, in pixels.
        crop: side S of the central square, at most `resize`.

    Returns:
        uint8 [3, S, S].

    Raises:
        ValueError: the crop is larger than the resized side.
        DamagedDataError: a strip so thin that it would be resized to more than MAX_PIXELS.
    """
    if crop > resize:
        raise ValueError(f"the central crop ({crop} px) is larger than the resized side ({resize} px)")
    short = min(image.size)
    width, height = (resize * side // short for side in image.size)
    _check_pixels(width, height)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(resized.crop((left, top, left + crop, top + crop)))


def load_image(path: str | Path, size: int) -> Tensor:
    """Read an image file and resize all of it to a square, bicubic and antialiased: for inference.

    Args:
        path: image file.
        size: side S of the result in pixels.

    Returns:
        uint8 [1, 3, S, S].

    Raises:
        FileNotFoundError: no such file.
        DamagedDataError: it cannot be read; the message names it.
    """
    try:
        image = decode(Path(path).read_bytes())
    except DamagedDataError as error:
        raise DamagedDataError(f"{path}: {error}") from error
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))[None]
