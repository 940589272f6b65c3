"""Square uint8 crops of images: random ones for training, whole or central ones for inference.

Shapes: H rows, W columns, S side of a square crop.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixio.images import jpeg
from pixio.images.decoding import check_pixels, decode, orientation
from pixio.images.normalization import to_tensor

Box = tuple[int, int, int, int]  # left, top, width, height, in pixels

# Decoding at a fraction of the resolution aliases otherwise than the bicubic filter does. How much that shows
# depends on how much larger than the crop the reduced image is, and on the detail in the photograph, seen in
# its bits per pixel. Below so many bits -> least ratio with which the mean difference stays below 2 of
# 255 levels (in more than 99 of 100 crops of ImageNet photographs, at any scale; typically it is 0.5).
_REDUCTION_MARGINS = ((1.0, 1.0), (1.5, 1.5), (math.inf, 2.5))


def crop_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw the box of a random resized crop, distributed as torchvision's RandomResizedCrop (Inception's).

    Ten attempts at an area uniform in `scale` and an aspect ratio log-uniform in `ratio`; after that the
    largest centered box whose aspect ratio is in range.

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


def whole_box(width: int, height: int) -> Box:
    """The box of a whole image, for `decode_crop`."""
    return 0, 0, width, height


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
    if frame is None or orientation(frame.exif) != 1:
        image = decode(data)
        return _resize_box(image, choose(*image.size), size, exact)
    check_pixels(frame.width, frame.height)
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
    """uint8 [H, W, 3] -> [3, S, S] with torch's vectorized kernel, channels last in memory all the way."""
    # the batch dimension comes first, or its stride would hide the memory format from the kernel
    image = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)  # [1, 3, H, W]
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True, align_corners=False)[0]


def resize_center_crop(image: Image.Image, resize: int, crop: int) -> Tensor:
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
    check_pixels(width, height)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(resized.crop((left, top, left + crop, top + crop)))
