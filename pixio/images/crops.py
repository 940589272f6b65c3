"""Square uint8 crops of images: random ones for training, whole or central ones for inference.

Shapes: H rows, W columns, S side of a square crop.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixio.images import jpeg
from pixio.images.decoding import check_pixels, decode, orientation
from pixio.images.normalization import to_tensor
from pixio.images.rasters import Box, Raster

# Decoding at a fraction of the resolution aliases otherwise than the bicubic filter does. How much that shows
# depends on how much larger than the crop the reduced image is, and on the detail in the photograph, seen in
# its bits per pixel. Below so many bits -> least ratio with which the mean difference stays below 2 of
# 255 levels (in more than 99 of 100 crops of ImageNet photographs, at any scale; typically it is 0.5).
_REDUCTION_MARGINS = ((1.0, 1.0), (1.5, 1.5), (math.inf, 2.5))

# How many times faster torch's kernel makes a pixel than Pillow's, at full scale.
_TORCH_GAIN = 5


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
            return _resize(rows[top:bottom, left:right], size=(size, size))
    r = reduction
    return _resize_box(decode(data), (left * r, top * r, (right - left) * r, (bottom - top) * r), size, exact)


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
    return _resize(np.array(crop), size=(size, size))


def _resize(pixels: np.ndarray, **size: Any) -> Tensor:
    """uint8 [H, W, 3] -> [3, H', W'] with torch's vectorized kernel, channels last in memory all the way.

    Args:
        pixels: the image.
        size: or scale_factor, as of `torch.nn.functional.interpolate`.
    """
    # the batch dimension comes first, or its stride would hide the memory format from the kernel
    image = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)  # [1, 3, H, W]
    return F.interpolate(image, **size, mode="bicubic", antialias=True, align_corners=False)[0]


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


class ScaledCrop(NamedTuple):
    """A square of an image that is scaled first, of which only what the square shows is read and scaled.

    What lies beyond the image, on the right or below, is padding.
    """

    height: int  # of the whole image once it is scaled, pixels
    width: int
    top: int  # of the square in the scaled image
    left: int
    size: int  # S
    mirrored: bool  # left and right are exchanged, at last

    @property
    def shown(self) -> tuple[int, int]:
        """Rows and columns of the square that are not padding."""
        return min(self.size, self.height - self.top), min(self.size, self.width - self.left)

    def of_image(self, image: Raster) -> np.ndarray:
        """The crop of an image: bicubic and antialiased, uint8 [S, S, 3], padded with 0.

        The pixels are those that Pillow gives for the whole image, but for rounding.
        """
        rows, columns = self.shown
        if (self.height, self.width) == (image.height, image.width):
            return self._fill(image.decode((self.left, self.top, columns, rows)), 0)
        bottom, right = self.top + rows, self.left + columns
        reduction = max(image.height / self.height, 1) * max(image.width / self.width, 1)
        if bottom * right < _TORCH_GAIN * reduction * rows * columns:
            part = _resize_corner(image, (self.height, self.width), bottom, right)
            return self._fill(part[self.top :, self.left :], 0)
        left, width, *across = _reach(self.left, columns, image.width / self.width, image.width)
        top, height, *down = _reach(self.top, rows, image.height / self.height, image.height)
        part = Image.fromarray(image.decode((left, top, width, height)))
        box = (across[0], down[0], across[1], down[1])
        return self._fill(np.asarray(part.resize((columns, rows), Image.Resampling.BICUBIC, box)), 0)

    def of_target(self, target: Raster, fill: float) -> np.ndarray:
        """The crop of a target: the nearest values, [S, S], padded with `fill`; the same as Pillow's."""
        rows, columns = self.shown
        down = _nearest(target.height, self.height)[self.top : self.top + rows]
        across = _nearest(target.width, self.width)[self.left : self.left + columns]
        left, top = int(across[0]), int(down[0])
        part = target.decode((left, top, int(across[-1]) + 1 - left, int(down[-1]) + 1 - top))
        return self._fill(part[down - top].take(across - left, axis=1), fill)

    def _fill(self, part: np.ndarray, fill: float) -> np.ndarray:
        square = np.full((self.size, self.size, *part.shape[2:]), fill, part.dtype)
        square[: part.shape[0], : part.shape[1]] = part
        return square[:, ::-1] if self.mirrored else square


def _resize_corner(image: Raster, size: tuple[int, int], bottom: int, right: int) -> np.ndarray:
    """The rows above `bottom` and columns left of `right` of an image resized to `size`, uint8.

    torch's kernel has no offset: it must begin where the image does.
    """
    sides, factors = [], []
    for needed, scaled, side in ((bottom, size[0], image.height), (right, size[1], image.width)):
        _, reached, *_ = _reach(0, needed, side / scaled, side)
        factor = scaled / side
        if scaled != side and math.floor(reached * factor) == reached:
            reached = side  # the kernel leaves a side alone whose length stays the same
        while math.floor(reached * factor) < needed:  # by rounding, where the whole side is needed
            factor = math.nextafter(factor, math.inf)
        sides.append(reached)
        factors.append(factor)
    pixels = image.decode((0, 0, sides[1], sides[0]))
    return _resize(pixels, scale_factor=factors)[:, :bottom, :right].permute(1, 2, 0).numpy()


def draw_scaled_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    size: int,
    scales: tuple[float, float] = (1.0, 1.0),
) -> ScaledCrop:
    """Draw a square of a scaled image, mirrored half of the time.

    Args:
        rng: source of randomness.
        height, width: of the image in pixels.
        size: S in pixels.
        scales: range in which the longer side is scaled, uniform in its pixels.
    """
    if scales != (1.0, 1.0):
        longer = max(height, width)
        new = int(rng.integers(int(scales[0] * longer), int(scales[1] * longer) + 1))
        height, width = (max(round(side * new / longer), 1) for side in (height, width))
    top = int(rng.integers(max(height - size, 0) + 1))
    left = int(rng.integers(max(width - size, 0) + 1))
    return ScaledCrop(height, width, top, left, size, bool(rng.random() < 0.5))


def _reach(first: int, count: int, scale: float, side: int) -> tuple[int, int, float, float]:
    """What a bicubic filter reads of an image's side for `count` scaled pixels from `first` on.

    Returns:
        First pixel and number of pixels; begin and end of the scaled pixels in those.
    """
    begin, end = first * scale, (first + count) * scale
    support = 2 * max(scale, 1.0) + 1
    start, stop = max(math.floor(begin - support), 0), min(math.ceil(end + support), side)
    return start, stop - start, begin - start, min(end - start, stop - start)


def _nearest(side: int, scaled: int) -> np.ndarray:
    """Pixel of a side that each of `scaled` pixels shows, int64; summed up step by step, as Pillow does."""
    steps = np.full(scaled, side / scaled)
    steps[0] /= 2
    return np.cumsum(steps).astype(np.int64)
