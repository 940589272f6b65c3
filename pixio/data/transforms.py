"""From encoded bytes to uint8 crops, and from uint8 crops to the encoder's input.

Shapes: B images, H rows, W columns, S side of a square crop. Crops stay uint8 until `normalise`, which runs
where the batch is, so that workers ship a quarter of the bytes.
"""

import functools
import io
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_PIXELS = 89_478_485  # Pillow's own warning level: a quarter of a GiB once decoded to RGB
FORMATS = ("JPEG", "PNG", "WEBP")  # nothing else is worth handing hostile bytes to


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
        float32, same shape: (pixel / 255 - mean) / std.

    Raises:
        ValueError: the images are not uint8 (already normalised, or on another scale).
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"normalise expects uint8 pixels (0-255), found {images.dtype}: pass crops as read")
    mean, std = _statistics(images.device)
    return (images.float() - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """Undo `normalise`: float [B, 3, H, W] or [3, H, W] -> uint8, rounded and clipped to 0-255."""
    mean, std = _statistics(images.device)
    return (images.float() * std + mean).round().clamp(0, 255).to(torch.uint8)


def decode(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG or WebP of any colour mode.

    Greyscale, palette and CMYK become RGB, 16-bit grey keeps its upper byte, transparency is laid over
    white, animations give their first frame. The size is checked in the header, before any pixel is decoded.

    Args:
        data: the encoded image.

    Returns:
        RGB image, 8 bits per channel.

    Raises:
        DamagedDataError: not an image of these formats, damaged, truncated, or above MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters raises
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise DamagedDataError(f"{image.width} x {image.height} is above {MAX_PIXELS} pixels")
            return _to_rgb(image)
    except DamagedDataError:
        raise
    except UnidentifiedImageError as error:
        raise DamagedDataError(f"not a {' or '.join(FORMATS)} image ({len(data)} bytes)") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        raise DamagedDataError(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
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
) -> tuple[int, int, int, int]:
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
    left, top, width, height = crop_box(rng, image.width, image.height, scale)
    # cropped first: `resize(box=...)` would let the filter reach pixels outside the box
    crop = image.crop((left, top, left + width, top + height))
    return _to_tensor(crop.resize((size, size), Image.Resampling.BICUBIC))


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
    """
    if crop > resize:
        raise ValueError(f"the central crop ({crop} px) is larger than the resized side ({resize} px)")
    short = min(image.size)
    width, height = (resize * side // short for side in image.size)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return _to_tensor(resized.crop((left, top, left + crop, top + crop)))


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
    return _to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))[None]


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]
