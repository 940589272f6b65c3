"""Where the images of a tar lie in it, from its headers alone."""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pixio.images.decoding import DamagedDataError
from pixio.images.listing import IMAGE_SUFFIXES, is_junk

MAX_BYTES = 1 << 29  # of one encoded image; what is larger is no photograph

MAX_HEADER = 1 << 20  # bytes of a record with a member's long name or pax fields
_ABOUT_NEXT = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
_DIGITS = re.compile(rb"\d{256}")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Entry(NamedTuple):
    """One image of a shard: its name, and where its bytes lie if the shard is a tar."""

    key: str
    offset: int = 0
    size: int = 0


class TarIndex(NamedTuple):
    """The image members of a tar, and which others it has lost or only links to, if any (`damage`).

    `extents` has the parts of sparse members that are stored, by offset: (place in the image, bytes) of each.
    """

    entries: list[Entry]
    extents: dict[int, list[tuple[int, int]]]
    damage: str


def index_tar(file: BinaryIO, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> TarIndex:
    """List the image members of an uncompressed tar, and of those that are appended to it.

    Only regular files are listed: links point elsewhere (those called as images are counted), and names are
    labels that are never opened. Of a tar that is cut off or damaged, the members before the damage are
    listed.

    Args:
        file: the tar.
        suffixes: in lower case; members with one of them, in any case, are listed, but for junk.

    Raises:
        DamagedDataError: not a readable tar, or one without an image; says what it is instead.
    """
    start = os.pread(file.fileno(), 8, 0)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise DamagedDataError(
                f"compressed with {kind}, so that no image can be read by its place: unpack it"
            )
    entries: list[Entry] = []
    extents: dict[int, list[tuple[int, int]]] = {}
    links = tars = 0
    damage = ""
    try:
        for member in _members(file):
            name = member.name.lower()
            image = name.endswith(suffixes) and not is_junk(member.name)
            sparse = _sparse(member)
            if member.islnk() or member.issym():
                links += image
            elif sparse is not None or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                tars += name.endswith((".tar", ".tar.gz", ".tgz"))
                if image:
                    entries.append(Entry(member.name, member.offset_data, member.size))
                    if sparse is not None:
                        extents[member.offset_data] = sparse
    except OSError as error:  # of the disk: the tar may be whole
        raise DamagedDataError(f"not a readable tar: {error}") from error
    except Exception as error:  # a header that makes no sense fails anywhere inside of tarfile
        damage = str(error) or f"a header makes no sense ({type(error).__name__})"
    if not entries and damage:
        raise DamagedDataError(f"not a readable tar: {damage}")
    left_out = f"{links:,} are links, which tar --dereference and --hard-dereference replace by their files"
    if not entries:
        found = f"; {left_out}" if links else ""
        found += f"; {tars} are tars themselves: unpack them" if tars else ""
        raise DamagedDataError(f"no image member ({', '.join(suffixes)}){found}")
    losses = [f"{damage}: the {len(entries):,} images before it are used"] if damage else []
    if links:
        losses.append(f"of {len(entries) + links:,} images {left_out}")
    return TarIndex(entries, extents, "; ".join(losses))


class _Header(tarfile.TarInfo):
    """A header that is looked at before tarfile reads all of what it says belongs to it."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # where tarfile lets subclasses in
        if self.type in _ABOUT_NEXT:
            if not 0 <= self.size <= MAX_HEADER:
                raise DamagedDataError(
                    f"a header record of {self.size:,} bytes, more than the {MAX_HEADER:,} allowed"
                )
            place = tar.fileobj.tell()
            if _DIGITS.search(tar.fileobj.read(self.size)):  # before Python 3.11.10 it takes their square
                raise DamagedDataError("a header holds a number of hundreds of digits")
            tar.fileobj.seek(place)
        return super()._proc_member(tar)  # type: ignore[misc]


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """All members of all tars that follow one another in a file; nothing but zeros lies between them."""
    start: int | None = 0
    end = os.fstat(file.fileno()).st_size
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            last = start - 1
            for member in tar:
                sparse = _sparse(member)
                stored = member.size if sparse is None else sum(size for _, size in sparse)
                if member.offset <= last or stored < 0 or member.size < 0:
                    raise DamagedDataError(f"impossible header of member {member.name!r}")
                if member.offset_data + stored > end:
                    raise DamagedDataError(f"cut off at byte {end:,}, inside of member {member.name!r}")
                last = member.offset
                yield member
            # tarfile takes a broken header for the end of the archive; the true end is zeros, or nothing
            stop = tar.offset
        if any(os.pread(file.fileno(), tarfile.BLOCKSIZE, stop)):
            raise DamagedDataError(f"broken header at byte {stop:,}")
        start = _next_tar(file, stop)


def _sparse(member: tarfile.TarInfo) -> list[tuple[int, int]] | None:
    """(offset, size) of each stored part of a sparse member; None for others."""
    return getattr(member, "sparse", None)


def _next_tar(file: BinaryIO, start: int) -> int | None:
    """Offset of the tar that begins after the zeros from `start` on, if one does."""
    while block := os.pread(file.fileno(), 1 << 20, start):
        if rest := block.lstrip(b"\0"):
            start += (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            return start if os.pread(file.fileno(), 5, start + 257) == b"ustar" else None
        start += len(block)
    return None


def read_member(descriptor: int, entry: Entry, extents: list[tuple[int, int]] | None = None) -> bytes:
    """The bytes of an entry of an open file, of which only `extents` are stored if it is sparse.

    Raises:
        DamagedDataError: too large, or fewer bytes than indexed.
    """
    if entry.size > MAX_BYTES:
        raise DamagedDataError(f"{entry.size:,} bytes, more than the {MAX_BYTES:,} allowed for an image")
    wanted = entry.size if extents is None else sum(size for _, size in extents)
    data = os.pread(descriptor, wanted, entry.offset)
    if len(data) != wanted:
        raise DamagedDataError(f"{len(data):,} bytes read of {wanted:,} indexed: the file has changed")
    if extents is None:
        return data
    image, at = bytearray(entry.size), 0
    for place, size in extents:
        image[place : place + size] = data[at : at + size]
        at += size
    return bytes(image)
