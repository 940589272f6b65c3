"""Decode the corner of a PNG that a crop needs: everything above and left of its last row and column.

A PNG is one deflated stream of rows, each written as differences from the row above and the pixel to the
left. So the stream is inflated only down to the last row needed, and the differences are undone only as far
right as needed: by OpenCV, which gets the corner as a small PNG of its own; where it is not installed by
Pillow, more slowly.
"""

import functools
import importlib
import io
import struct
import zlib
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _RGB, _PALETTE = 0, 2, 3  # color types
_FILTERS = 5  # ways in which a row can be written


class Header(NamedTuple):
    """The header of a PNG that `decode_corner` can read."""

    width: int  # pixels
    height: int
    bits: int  # per value: 8, or 16 with one value
    channels: int  # values per pixel: 1 (gray level or number in the palette) or 3 (RGB)
    at: int  # offset of the first chunk of pixels
    exif: bool  # whether there is a chunk of it


def read_header(data: bytes) -> Header | None:
    """Read the header of a gray, palette or RGB PNG; None for anything that is not plainly one.

    Pixels of fewer than 8 bits, RGB of 16 bits, transparency of RGB and interlacing are not plain.
    """
    if not data.startswith(SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, bits, color, *ways = struct.unpack(">IIBBBBB", data[16:29])
    plain = (bits, color) in ((8, _GRAY), (8, _PALETTE), (8, _RGB), (16, _GRAY))
    if not plain or not width or not height or ways != [0, 0, 0]:
        return None
    at, names = 33, set()
    while at + 12 <= len(data):
        name = data[at + 4 : at + 8]
        if name == b"IDAT":
            if color == _RGB and b"tRNS" in names:
                return None
            return Header(width, height, bits, 3 if color == _RGB else 1, at, b"eXIf" in names)
        names.add(name)
        at += 12 + int.from_bytes(data[at : at + 4], "big")  # length, name, content, checksum
    return None


def decode_corner(data: bytes, header: Header, right: int, bottom: int) -> np.ndarray | None:
    """Decode the pixels above row `bottom` and left of column `right`.

    Args:
        data: the encoded image.
        header: of `data`; check its size first, all its pixels may be decoded.
        right, bottom: 1 to the width and height.

    Returns:
        uint8 [bottom, right, 3], RGB; or values as stored, uint8 or uint16 [bottom, right]. None when the
        data are damaged.
    """
    pixel = header.channels * header.bits // 8  # bytes
    row = 1 + header.width * pixel  # how it is written, then its pixels
    stream = _inflate(data, header.at, bottom * row)
    if stream is None:
        return None
    corner = np.frombuffer(stream, np.uint8).reshape(bottom, row)[:, : 1 + right * pixel]
    filters = corner[:, 0].max()
    if filters >= _FILTERS:
        return None
    if filters == 0 and header.bits == 8:  # as written, as is usual with palettes
        return corner[:, 1:].reshape((bottom, right, 3)[: 2 + (header.channels == 3)])
    color = _RGB if header.channels == 3 else _GRAY
    small = b"".join(
        (
            SIGNATURE,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", right, bottom, header.bits, color, 0, 0, 0)),
            _chunk(b"IDAT", zlib.compress(corner.tobytes(), 0)),
            _chunk(b"IEND", b""),
        )
    )
    cv2 = _opencv()
    if cv2 is None:
        return np.array(Image.open(io.BytesIO(small), formats=("PNG",)))
    try:
        flag = cv2.IMREAD_COLOR_RGB if header.channels == 3 else cv2.IMREAD_UNCHANGED
        return cv2.imdecode(np.frombuffer(small, np.uint8), flag)
    except cv2.error:  # larger than it wants to decode
        return None


@functools.cache
def _opencv() -> ModuleType | None:
    """Imported here, since it takes a while and few programs need it; None where it is not installed."""
    try:
        return importlib.import_module("cv2")
    except ImportError:
        return None


def _inflate(data: bytes, at: int, length: int) -> bytes | None:
    """The first `length` bytes of the stream whose chunks begin at `at`; None where it is damaged before."""
    inflater, parts = zlib.decompressobj(), []
    while data[at + 4 : at + 8] == b"IDAT":
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if zlib.crc32(data[at + 4 : end]).to_bytes(4, "big") != data[end : end + 4]:
            return None
        try:
            parts.append(inflater.decompress(data[at + 8 : end], length))
        except zlib.error:
            return None
        length -= len(parts[-1])
        if length == 0:
            return b"".join(parts)
        at = end + 4
    return None


def _chunk(name: bytes, content: bytes) -> bytes:
    return b"".join(
        (
            len(content).to_bytes(4, "big"),
            name,
            content,
            zlib.crc32(content, zlib.crc32(name)).to_bytes(4, "big"),
        )
    )
