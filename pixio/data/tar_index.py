"""Where the images of a tar lie in it, from its headers alone."""

import os
import tarfile
from typing import BinaryIO, NamedTuple

from pixio.images.decoding import DamagedDataError
from pixio.images.listing import IMAGE_SUFFIXES, is_junk


class Entry(NamedTuple):
    """One image of a shard: its name, and where its bytes lie if the shard is a tar."""

    key: str
    offset: int = 0
    size: int = 0


def index_tar(file: BinaryIO) -> list[Entry]:
    """List the image members of an uncompressed tar.

    Only regular files count: links point elsewhere, and names are labels that are never opened.

    Raises:
        DamagedDataError: not a readable tar, or one without an image.
    """
    entries, end = [], os.fstat(file.fileno()).st_size
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            last = -1
            for member in tar:
                if member.offset <= last or member.size < 0 or member.offset_data + member.size > end:
                    raise DamagedDataError(f"impossible header of member {member.name!r}")
                last = member.offset
                regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.sparse
                if regular and member.name.lower().endswith(IMAGE_SUFFIXES) and not is_junk(member.name):
                    entries.append(Entry(member.name, member.offset_data, member.size))
            # tarfile takes a broken header for the end of the archive; the true end is zeros, or nothing
            if any(os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)):
                raise DamagedDataError(f"broken header at byte {tar.offset}")
    except DamagedDataError:
        raise
    except MemoryError as error:  # tarfile reserves what a header says that a long name takes
        raise DamagedDataError("not a readable tar: a header claims an impossible size") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise DamagedDataError(f"not a readable tar: {error}") from error
    if not entries:
        raise DamagedDataError(f"no image member ({', '.join(IMAGE_SUFFIXES)})")
    return entries
