"""Depth maps and segmentation masks as files hold them. Letters: H x W pixels."""

import io
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image

from pixio.images.decoding import DamagedDataError, check_pixels, without_text

IGNORE = 255  # mask value of pixels that are not scored


def read_depth(path: Path, units_per_meter: float) -> np.ndarray:
    """Read depth in meters.

    Args:
        path: a 16-bit gray PNG, or an .npy file with meters (unknown: 0, NaN or infinity).
        units_per_meter: PNG values per meter.

    Returns:
        float32 [H, W], 0 where it is unknown.

    Raises:
        ValueError: unreadable, of another bit depth or shape; the message names the file.
    """
    if path.suffix.lower() != ".npy":
        values = _read_png(path, ("I;16", "I"), "16-bit gray, as depth in fractions of a meter needs")
        return (values / units_per_meter).astype(np.float32)
    try:
        values = open_memmap(path, mode="r")  # not `load`, which also opens archives and believes any size
    except OSError:
        raise
    except Exception as error:  # a header is a piece of Python, and fails in as many ways
        raise ValueError(f"{path} is not a readable .npy file: {error}") from error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {values.dtype} {list(values.shape)}, expected floats [H, W] in meters"
        )
    return np.where(np.isfinite(values), values, 0).astype(np.float32)


def read_mask(path: Path) -> np.ndarray:
    """Read class numbers as stored, uint8 [H, W]: a gray or palette PNG of 8 bits or fewer per pixel.

    Raises:
        ValueError: unreadable, or of another pixel format; the message names the file.
    """
    return _read_png(path, ("1", "L", "P"), "gray or palette, with the number of the class in each pixel")


def drop_zero(mask: np.ndarray) -> np.ndarray:
    """Masks that count classes from 1: 0 becomes ignored, 1 becomes 0, …; 255 stays ignored. uint8."""
    return np.where((mask == 0) | (mask == IGNORE), IGNORE, mask - 1).astype(np.uint8)


def _read_png(path: Path, modes: tuple[str, ...], expected: str) -> np.ndarray:
    """Values of a PNG as stored, [H, W]; `modes` are Pillow's pixel formats, `expected` says which."""
    try:
        data = without_text(path.read_bytes())
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            check_pixels(image.width, image.height)
            if image.mode not in modes:
                raise ValueError(f"its pixel format is {image.mode}, expected {expected}")
            values = np.array(image)
        if image.mode == "1":
            return values.astype(np.uint8)
        return values // _stretch(data) if image.mode == "L" else values
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        raise DamagedDataError(f"{path} is not usable: {error}") from error


def _stretch(data: bytes) -> int:
    """What Pillow multiplies gray values of 2 or 4 bits by, to fill 0-255; 1 for 8 bits."""
    bits = data[24]  # behind the signature, the length and name of IHDR, width and height
    return 255 // (2**bits - 1)
