"""From the bytes of an image file, which may be hostile, to upright RGB pixels."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pixio.images import jpeg, png

MAX_PIXELS = 89_478_485  # Pillow's own warning level: a quarter of a GiB once decoded to RGB
FORMATS = ("JPEG", "PNG", "WEBP")  # nothing else is worth handing hostile bytes to

_JPEG_END = b"\xff\xd9"
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


def decode(data: bytes, upright: bool = True, max_pixels: int | None = None) -> Image.Image:
    """Decode a JPEG, PNG or WebP of any color mode.

    Grayscale, palette and CMYK become RGB, 16-bit gray keeps its upper byte, transparency is laid over
    white, animations give their first frame. The size is checked in the header, before any pixel is decoded.

    Args:
        data: the encoded image.
        upright: turn it as its EXIF data say; else the pixels stay where they are stored.
        max_pixels: larger images are refused; by default MAX_PIXELS, at most twice that, which is Pillow's
            own limit.

    Returns:
        RGB image, 8 bits per channel.

    Raises:
        DamagedDataError: not an image of these formats, damaged, truncated, or too large.
    """

    def rgb(image: Image.Image) -> Image.Image:
        if data.startswith(b"\xff\xd8") and jpeg.too_many_scans(data):
            raise DamagedDataError(f"a JPEG of more than {jpeg.MAX_SCANS} scans takes too long to decode")
        turn = _UPRIGHT.get(orientation(image.info.get("exif"))) if upright else None
        image = to_rgb(image)
        return image.transpose(turn) if turn is not None else image

    return _open(data, rgb, max_pixels)


def read_size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image as `decode` returns it, in pixels, from its header alone.

    Raises:
        DamagedDataError: not an image of these formats, or above MAX_PIXELS.
    """

    def size(image: Image.Image) -> tuple[int, int]:
        sideways = orientation(image.info.get("exif")) > 4
        return image.size[::-1] if sideways else image.size

    return _open(data, size)


def _open(data: bytes, use: Callable[[Image.Image], Any], max_pixels: int | None = None) -> Any:
    """What `use` makes of an image whose header has been read and found acceptable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters raises
            image = Image.open(io.BytesIO(without_text(data)), formats=FORMATS)
            check_pixels(image.width, image.height, max_pixels)
            try:
                return use(image)
            except OSError:
                if not _lacks_only_end_marker(data):
                    raise
                return use(Image.open(io.BytesIO(data + _JPEG_END), formats=FORMATS))
    except DamagedDataError:
        raise
    except UnidentifiedImageError as error:
        raise DamagedDataError(f"not a {' or '.join(FORMATS)} image ({len(data)} bytes)") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        raise DamagedDataError(f"{type(error).__name__}: {error}") from error


def read_turn(data: bytes) -> int:
    """EXIF orientation of an encoded image, 1 to 8; see `orientation`.

    Raises:
        DamagedDataError: not an image of these formats, or above MAX_PIXELS.
    """
    return _open(data, lambda image: orientation(image.info.get("exif")))


def without_text(data: bytes) -> bytes:
    """A PNG without its color profile and texts, which Pillow refuses if large; else as it is."""
    if not data.startswith(png.SIGNATURE):
        return data
    kept, at = [png.SIGNATURE], len(png.SIGNATURE)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, name, content, checksum
        if data[at + 4 : at + 8] not in (b"iCCP", b"iTXt", b"zTXt", b"tEXt"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _lacks_only_end_marker(data: bytes) -> bool:
    """Whether the pixels of a JPEG are complete: what follows its data then changes none of them."""
    if not data.startswith(b"\xff\xd8") or data.endswith(_JPEG_END):
        return False
    data = data.removesuffix(b"\xff")
    one, other = (
        np.asarray(Image.open(io.BytesIO(data + filler + _JPEG_END), formats=("JPEG",)))
        for filler in (b"", bytes(range(254, 0, -1)) * 8)
    )
    return np.array_equal(one, other)


def check_pixels(width: int, height: int, max_pixels: int | None = None) -> None:
    """Refuse an image of more pixels than allowed, by default MAX_PIXELS.

    Raises:
        DamagedDataError: it has more.
    """
    limit = max_pixels or MAX_PIXELS
    if width * height > limit:
        raise DamagedDataError(f"{width} x {height} pixels, more than the {limit:,} allowed")


def orientation(exif: bytes | None) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 also where it is missing, unreadable or none of these."""
    if not exif:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags = Image.Exif()
            tags.load(exif)
            value = int(tags.get(_EXIF_ORIENTATION, 1))
            return value if value in _UPRIGHT else 1
    except Exception:  # as hostile as the pixels, but worth no image
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, as `decode` says; it is loaded, but not turned."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
