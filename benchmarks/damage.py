"""How files are damaged: by chance, also inside of their format, so that checksums and lengths stay right."""

import io
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

from pixio.images import png


class Format(NamedTuple):
    """How a file is taken apart and put together with lengths and checksums that are right."""

    unpack: Callable[[bytes], list[bytes]]
    pack: Callable[[list[bytes]], bytes]


# ---------------------------------------------------------------------------------------------- formats
def unzip(data: bytes) -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(part.file_size for part in archive.infolist()) > 1 << 24:
            raise ValueError("an attack, which stays as it is")
        return [part for name in archive.namelist() for part in (name.encode(), archive.read(name))]


def _zip(parts: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in zip(parts[::2], parts[1::2], strict=True):
            archive.writestr(zipfile.ZipInfo(name.decode("latin-1").replace("\0", "0") or "0"), content)
    return buffer.getvalue()


def _split_safetensors(data: bytes) -> list[bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return [data[8:end], data[end:]]


def _join_safetensors(parts: list[bytes]) -> bytes:
    return len(parts[0]).to_bytes(8, "little") + b"".join(parts)


def chunks(data: bytes) -> list[bytes]:
    """Name and content of each chunk of a PNG; the content of pixels unfolded."""
    parts, at = [], 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        name, content = data[at + 4 : at + 8], data[at + 8 : end]
        parts += [name, zlib.decompress(content) if name == b"IDAT" else content]
        at = end + 4
    return parts


def join_chunks(parts: list[bytes]) -> bytes:
    data = png.SIGNATURE
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        content = zlib.compress(content, 1) if name == b"IDAT" else content
        data += struct.pack(">I", len(content)) + name + content
        data += struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))
    return data


def _blocks(data: bytes) -> list[bytes]:
    return [data[at : at + 512] for at in range(0, len(data), 512)]


def _join_blocks(parts: list[bytes]) -> bytes:
    return b"".join(
        header(part) if part[257:262] == b"ustar" and len(part) == 512 else part for part in parts
    )


def header(block: bytes) -> bytes:
    """A header of a tar with its checksum."""
    return block[:148] + b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:])) + block[156:]


ZIP = Format(unzip, _zip)
SAFETENSORS = Format(_split_safetensors, _join_safetensors)
PNG = Format(chunks, join_chunks)
TAR = Format(_blocks, _join_blocks)
LINES = Format(lambda data: data.splitlines(keepends=True), b"".join)

# ---------------------------------------------------------------------------------------------- damage
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:e-?\d+)?|true|false|null|[\w.]+|[\[\]{}:,]')
_WORDS = (
    *(b"null", b"true", b"[]", b"{}", b'""', b'"a"', b"[[1]]", b"0", b"-1", b"1e999", b"NaN", b"Infinity"),
    *(
        b"9" * 30,
        b"1" * 5000,
        b"4294967296",
        b"9223372036854775807",
        b"0.5",
        b"\0",
        b"../../x",
        b"/etc/passwd",
    ),
    *(rb'"\ud800"', b"a" * 300, b"\xff\xfe", b"\xed\xa0\x80", b"!!python/name:os.system", b"*a", b"&a"),
    *(b"{" * 50, b"[" * 20_000, b"__proto__", b"-", b"\n", b"\t", b" "),
)
_NUMBERS = tuple(
    value.to_bytes(size, order, signed=True)
    for size in (1, 2, 4, 8)
    for order in ("big", "little")
    for value in (0, 1, -1, 2 ** (8 * size - 1) - 1, -(2 ** (8 * size - 1)), 64)
)


def damage(data: bytes, format: Format | None, rng: random.Random, other: bytes = b"") -> bytes:
    """`data` with one or a few changes; half of the time inside of its format."""
    if format and rng.random() < 0.5:
        try:
            parts = format.unpack(data)
            place = rng.randrange(len(parts))
            if rng.random() < 0.1:
                parts.insert(place, parts[rng.randrange(len(parts))])
            else:
                parts[place] = _change(parts[place], rng, other)
            return format.pack(parts)
        except Exception:  # it is damaged already, and fails in as many ways
            pass
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = _change(data, rng, other)
    return data


def _change(data: bytes, rng: random.Random, other: bytes) -> bytes:
    place, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    stop = min(stop, place + rng.choice((1, 4, 64, 1 << 20)))
    kind = rng.randrange(8)
    if kind == 0:
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if kind == 1:
        number = rng.choice(_NUMBERS)
        return data[:place] + number + data[place + len(number) :]
    if kind == 2:
        return data[:place] + data[stop:]
    if kind == 3:
        return data[:stop] + data[place:]
    if kind == 4:
        return data[:place] + other[place % (len(other) + 1) :][: stop - place] + data[stop:]
    if kind == 5 and place < len(data):
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    tokens = list(_TOKEN.finditer(data[place : place + 4096]))
    if not tokens:
        return data[:place] + rng.choice(_WORDS) + data[place:]
    start, end = (place + at for at in rng.choice(tokens[:50]).span())
    return data[:start] + rng.choice(_WORDS) + data[end:]
