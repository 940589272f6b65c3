"""Depth maps and segmentation masks as files hold them. Letters: H x W pixels."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image

from pixio.images import png
from pixio.images.decoding import DamagedDataError, check_pixels, without_text
from pixio.images.rasters import Box, Raster, cut, raster_of

IGNORE = 255  # mask value of pixels that are not scored


def open_depth(path: Path, units_per_meter: float) -> Raster:
    """Open a depth map.

    Args:
        path: a 16-bit gray PNG, or an .npy file with meters (unknown: 0, NaN or infinity).
        units_per_meter: PNG values per meter.

    Returns:
        A raster of meters, float32 [h, w], 0 where depth is unknown.

    Raises:
        ValueError: unreadable, of another bit depth or shape; the message names the file.
    """
    if path.suffix.lower() != ".npy":
        stored = _open_png(path, 16, ("I;16", "I"), "16-bit gray, as depth in fractions of a meter needs")
        return replace(stored, decode=lambda box: (stored.decode(box) / units_per_meter).astype(np.float32))
    try:
        values = open_memmap(path, mode="r")  # not `load`, which also opens archives and believes any size
    except OSError:
        raise
    except Exception as error:  # a header is a piece of Python, and fails in as many ways
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a readable .npy file: {reason}") from error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {values.dtype} {list(values.shape)}, expected floats [H, W] in meters"
        )

    def meters(box: Box) -> np.ndarray:
        part = cut(values, box)
        return np.where(np.isfinite(part), part, 0).astype(np.float32)

    height, width = values.shape
    return Raster(height, width, meters)


def open_mask(path: Path) -> Raster:
    """Open a map of class numbers as stored, uint8: a gray or palette PNG of 8 bits or fewer per pixel.

    Raises:
        ValueError: unreadable, or of another pixel format; the message names the file.
    """
    return _open_png(path, 8, ("1", "L", "P"), "gray or palette, with the number of the class in each pixel")


def drop_zero(mask: np.ndarray) -> np.ndarray:
    """Masks that count classes from 1: 0 becomes ignored, 1 becomes 0, …; 255 stays ignored. uint8."""
    return np.where((mask == 0) | (mask == IGNORE), IGNORE, mask - 1).astype(np.uint8)


def _open_png(path: Path, bits: int, modes: tuple[str, ...], expected: str) -> Raster:
    """Values of a PNG as stored: plainly of `bits`, or of a pixel format of Pillow in `modes`."""

    def read_whole() -> np.ndarray:
        try:
            with Image.open(io.BytesIO(without_text(data)), formats=("PNG",)) as image:
                check_pixels(image.width, image.height)
                if image.mode not in modes:
                    raise ValueError(f"its pixel format is {image.mode}, expected {expected}")
                values = np.array(image)
            if image.mode == "1":
                return values.astype(np.uint8)
            return values // _stretch(data) if image.mode == "L" else values
        except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
            raise DamagedDataError(f"{path} is not usable: {error}") from error

    data = path.read_bytes()
    header = png.read_header(data)
    if header is None or (header.bits, header.channels) != (bits, 1):
        return raster_of(read_whole())
    try:
        check_pixels(header.width, header.height)
    except DamagedDataError as error:
        raise DamagedDataError(f"{path} is not usable: {error}") from error

    def decode(box: Box) -> np.ndarray:
        left, top, width, height = box
        corner = png.decode_corner(data, header, left + width, top + height)
        return cut(read_whole() if corner is None else corner, box)

    return Raster(header.height, header.width, decode)


def _stretch(data: bytes) -> int:
    """What Pillow multiplies gray values of 2 or 4 bits by, to fill 0-255; 1 for 8 bits."""
    return 255 // (2 ** data[24] - 1)  # behind signature, length and name of IHDR, width and height
