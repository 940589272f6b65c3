"""Images and targets of which only the part that is needed is decoded.

Letters: H x W pixels of a file, h x w of a box.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pixio.images import jpeg, png
from pixio.images.decoding import check_pixels, decode, orientation

Box = tuple[int, int, int, int]  # left, top, width, height, in pixels


@dataclass(frozen=True)
class Raster:
    """What a file's header says, and how to get at its pixels.

    Attributes:
        height, width: H and W.
        decode: the pixels inside of a box, [h, w] or [h, w, 3]; raises ValueError when they are damaged.
    """

    height: int
    width: int
    decode: Callable[[Box], np.ndarray]

    def whole(self) -> np.ndarray:
        """All pixels, [H, W] or [H, W, 3]."""
        return self.decode((0, 0, self.width, self.height))

    def inside(self, box: Box) -> "Raster":
        """The part inside of a box as if there was nothing around it."""
        left, top, width, height = box
        return Raster(height, width, lambda inner: self.decode((left + inner[0], top + inner[1], *inner[2:])))


def cut(array: np.ndarray, box: Box) -> np.ndarray:
    """The part of an array [H, W, …] inside of a box, [h, w, …]; nothing is copied."""
    left, top, width, height = box
    return array[top : top + height, left : left + width]


def raster_of(array: np.ndarray) -> Raster:
    """An array [H, W, …] as a raster."""
    height, width = array.shape[:2]
    return Raster(height, width, lambda box: cut(array, box))


def open_image(data: bytes, upright: bool = True) -> Raster:
    """Open an encoded image as `pixio.images.decoding.decode` would decode it, to the same pixels.

    JPEGs are decoded down to the last row of a box, by libjpeg-turbo; plain RGB PNGs down to its last row
    and right to its last column. Everything else is decoded here and whole, by Pillow.

    Args:
        data: the encoded image.
        upright: turn it as its EXIF data say.

    Returns:
        A raster of RGB pixels, uint8 [h, w, 3].

    Raises:
        DamagedDataError: as `decode` does, here or when decoding.
    """

    def decode_whole(box: Box) -> np.ndarray:
        return cut(np.array(decode(data, upright)), box)

    frame = jpeg.read_frame(data)
    if frame and not (upright and orientation(frame.exif) != 1):
        check_pixels(frame.width, frame.height)

        def decode_jpeg(box: Box) -> np.ndarray:
            rows = jpeg.decode_rows(data, frame, box[1] + box[3], 1, smooth=True)
            return decode_whole(box) if rows is None else cut(rows, box)

        return Raster(frame.height, frame.width, decode_jpeg)
    header = png.read_header(data)
    if header and header.channels == 3 and not (upright and header.exif):
        check_pixels(header.width, header.height)

        def decode_png(box: Box) -> np.ndarray:
            left, top, width, height = box
            corner = png.decode_corner(data, header, left + width, top + height)
            return decode_whole(box) if corner is None else cut(corner, box)

        return Raster(header.height, header.width, decode_png)
    return raster_of(np.array(decode(data, upright)))
