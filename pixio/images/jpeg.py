"""Decode the rows of a JPEG that a crop needs, at the scale that it needs.

Most of a JPEG's decoding time goes into its entropy-coded data, which can only be read from the top. Two
things spare the rest: a frame header that claims fewer rows ends the work below the crop, and libjpeg's
scaled inverse DCT computes 1/2, 1/4 or 1/8 of the pixels per side. simplejpeg hands out libjpeg-turbo's
pixels without a copy; where it is not installed Pillow does the same, more slowly.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # no wheel for this platform
    simplejpeg = None

MAX_SCANS = 100  # encoders make about ten; each takes 25 ms of an image of MAX_PIXELS
_BASELINE, _PROGRESSIVE, _SCAN = (0xC0, 0xC1), (0xC2,), 0xDA


class Frame(NamedTuple):
    """The header of a JPEG that `decode_rows` can read."""

    width: int  # pixels
    height: int
    baseline: bool  # one pass from top to bottom, which can stop early
    at: int  # offset of the frame header
    unit: int  # rows that are coded together
    exif: bytes | None


def read_frame(data: bytes) -> Frame | None:
    """Find the frame header of an 8-bit gray or color JPEG; None for anything that is not plainly one."""
    if data[:2] != b"\xff\xd8":
        return None
    at, exif, channels = 2, None, 0
    frame: Frame | None = None
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SCAN:
            if frame is None:
                return None
            # of a baseline JPEG whose first scan has all channels, later scans are not read
            one_scan = frame.baseline and data[at + 4] == channels
            return None if not one_scan and too_many_scans(data) else frame._replace(exif=exif)
        if marker in _BASELINE + _PROGRESSIVE:
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            samplings = data[at + 11 : at + 10 + 3 * data[at + 9] : 3]  # per channel: horizontal, vertical
            channels = len(samplings)
            if frame or data[at + 4] != 8 or channels not in (1, 3) or not height or not width:
                return None
            unit = 8 * max(1, *(sampling & 15 for sampling in samplings))
            frame = Frame(width, height, marker in _BASELINE, at, unit, exif)
        elif not (0xC4 <= marker <= 0xFE) or 0xD0 <= marker <= 0xD9:  # another kind of frame, or no segment
            return None
        if marker == 0xE1:
            segment = data[at + 4 : at + 2 + length]
            exif = segment if segment.startswith(b"Exif\0\0") else exif
        at += 2 + length
    return None


def too_many_scans(data: bytes) -> bool:
    """Whether a JPEG goes over its pixels so often that a small file takes minutes to decode."""
    return data.count(bytes((0xFF, _SCAN))) > MAX_SCANS


def decode_rows(
    data: bytes, frame: Frame, bottom: int, reduction: int, smooth: bool = False
) -> np.ndarray | None:
    """Decode a JPEG from its first row to `bottom`, at 1/`reduction` of its resolution.

    Args:
        data: the encoded image.
        frame: of `data`.
        bottom: rows needed, at full resolution.
        reduction: 1, 2, 4 or 8.
        smooth: interpolate between coarser chroma values at full resolution too, as Pillow does.

    Returns:
        uint8 [H, W, 3], RGB: at least the rows asked for and all columns, each side divided by `reduction`
        and rounded up. None when libjpeg complains about the data.
    """
    needed = bottom + smooth  # the chroma of a row is interpolated with that of the next
    rows = -(-needed // frame.unit) * frame.unit
    if shortened := frame.baseline and rows < frame.height:
        data = data[: frame.at + 5] + rows.to_bytes(2, "big") + data[frame.at + 7 :]
    height, width = (-(-side // reduction) for side in (rows if shortened else frame.height, frame.width))
    if simplejpeg is None:
        return _decode_with_pillow(data, height, width, reduction)
    pixels = np.empty((height, width, 3), np.uint8)
    try:
        found = simplejpeg.decode_jpeg_header(data, height, width)
        if found[:2] != (height, width):
            return None
        # quick chroma would show only where a reduced image is magnified again by what follows
        fast = reduction == 1 and not smooth
        simplejpeg.decode_jpeg(
            data, "RGB", fastupsample=fast, min_height=height, min_width=width, buffer=pixels
        )
    except ValueError as error:
        # libjpeg names its first complaint only, so that this one says that the rows before are sound
        if not (shortened and "extraneous bytes before marker" in str(error)):
            return None
    return pixels


def _decode_with_pillow(data: bytes, height: int, width: int, reduction: int) -> np.ndarray | None:
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        image.draft("RGB", (image.width // reduction, image.height // reduction))
        pixels = np.array(image.convert("RGB"))
    except Exception:  # Pillow's decoders raise almost anything on damaged bytes
        return None
    return pixels if pixels.shape == (height, width, 3) else None
