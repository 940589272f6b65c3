"""Atomic writes (a file is complete or absent), JSON, and checks of files from untrusted sources."""

import errno
import io
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_LINK_STORES = (".dvc/cache", ".git/annex/objects")  # where DVC and git-annex keep the files they link to
MAX_JSON = 2**24  # bytes; the index of the largest model has 0.1 MB


def write_atomic(path: str | os.PathLike, writer: Callable[[BinaryIO], object]) -> None:
    """Write a file that is never seen incomplete: `writer` fills a temporary one, which is then renamed.

    Args:
        path: the file to make or replace; its folder exists.
        writer: called once with the binary file to write to, which can seek but not read.

    Raises:
        OSError: writing failed (on a full disk the message has the bytes needed and free); `path` is what it
            was and nothing is left beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        measured = _MeasuredFile(open(temporary, "wb", buffering=0))  # noqa: SIM115 (closed by its `close`)
    except OSError as error:
        error.filename = str(path)  # the name that the caller knows
        raise disk_full(error, path) or error from None
    try:
        with measured, io.BufferedWriter(measured) as file:
            writer(file)
            file.flush()
            measured.fsync()
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if full := disk_full(measured.error or error, path, measured.size):
            raise full from error
        raise
    fsync(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file; see `write_atomic`."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file that people can read, ending in a newline; see `write_atomic` and `finite`."""
    write_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """`content` with None (null in JSON) for each number that is not finite: JSON has no NaN or infinity."""
    if isinstance(content, dict):
        return {name: finite(part) for name, part in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(part) for part in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file, which may come from an untrusted source.

    Raises:
        ValueError: too large, unreadable, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes, at most {MAX_JSON:,} expected")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise ValueError(f"{path.absolute()} cannot be read as JSON: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def check_archive(path: Path) -> None:
    """Refuse a compressed zip archive, which may be a zip bomb: `torch.save` stores its data uncompressed.

    Raises:
        ValueError: its members are larger than the file.
        zipfile.BadZipFile: it is not a zip archive.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        uncompressed = sum(member.file_size for member in archive.infolist())
    if uncompressed > size:
        raise ValueError(f"a compressed archive, {uncompressed:,} bytes in a file of {size:,}")


def parts_of(content: Any, limit: int) -> Iterator[Any]:
    """All values, at any depth, of the mappings, lists and tuples that an unpickler returned.

    Args:
        content: may refer to one object many times, or to itself: a few bytes then expand without end.
        limit: the most values allowed, such as the bytes of the file: each value takes at least one.

    Raises:
        ValueError: there are more.
    """
    waiting, found = [content], 0
    while waiting:
        part = waiting.pop()
        yield part
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
        found += len(inner)
        if found > limit:
            raise ValueError(f"its values refer to one another and expand to more than {limit:,}")
        waiting += inner


def file_in(folder: Path, name: str) -> Path:
    """The path of a file in a folder from an untrusted source; the file need not exist.

    It may link into the store of the cache that the folder belongs to (Hugging Face hub, DVC, git-annex).

    Raises:
        ValueError: it leads out of the folder and its cache.
    """
    path, parents = folder / name, folder.resolve().parents
    stores = [folder.resolve(), *(parent / store for parent in parents for store in _LINK_STORES)]
    stores += [parent.parent / "blobs" for parent in parents if parent.name == "snapshots"]
    if Path(name).name != name or not any(path.resolve().is_relative_to(store) for store in stores):
        raise ValueError(f"{path} leads out of its folder, to {path.resolve()}; put the file itself there")
    return path


@contextmanager
def temporary_path(target: str | os.PathLike, size: int = 0) -> Iterator[Path]:
    """A path to write a file or folder to (and files beside it), which move to `target` once complete.

    Args:
        target: the file to make or replace, or the folder to make; its folder exists.
        size: bytes that it takes at least, where that is known before.

    Raises:
        OSError: writing failed, as in `write_atomic`.
    """
    target = Path(target)
    if size:
        require_free(target, size)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            yield Path(folder) / target.name
            for file in Path(folder).rglob("*"):
                if file.is_file():
                    fsync(file)
            # `FILE.data` before the `FILE` that refers to it
            for made in sorted(Path(folder).iterdir(), reverse=True):
                os.replace(made, target.parent / made.name)
    except Exception as error:
        if full := disk_full(error, target):  # there was room for `size`
            raise full from error
        raise
    fsync(target.parent)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what processes that were killed in `write_atomic` have left in a folder.

    Args:
        folder: where nobody else is writing files of that name.
        name: of the file that was to be written, or a pattern for several.
    """
    for leftover in folder.glob(f".{name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def require_free(path: str | os.PathLike, size: int) -> None:
    """Refuse to begin a file or folder that the disk has no room for.

    Args:
        path: what is to be written; its folder exists.
        size: bytes it will take.

    Raises:
        OSError: fewer are free.
    """
    if shutil.disk_usage(Path(path).parent).free < size:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise disk_full(full, path, size) or full


def disk_full(error: BaseException | None, path: str | os.PathLike, needed: int = 0) -> OSError | None:
    """The error to show a user where `error`, raised by any library while `path` was written, means that the
    disk is full, a quota is used up, or the file is larger than the system allows.

    Args:
        error: the exception; those during whose handling it was raised count too.
        path: what was to be written.
        needed: bytes that it takes; 0 when that is not known.

    Returns:
        An error of one line, or None when `error` is of another kind.
    """
    while error is not None:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                path = Path(path).absolute()
                room = f"{shutil.disk_usage(path.parent).free:,} bytes free"
                room = f"{needed:,} bytes needed, {room}" if needed else f"more needed than the {room}"
                full = OSError(f"cannot write {path}: {os.strerror(code)} ({room})")
                full.errno = code
                return full
        error = error.__cause__ or error.__context__
    return None


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; not every system can do that for folders."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


class _MeasuredFile(io.RawIOBase):
    """A new file that measures its size; after a failed write it only counts what would be written.

    Args:
        file: empty and unbuffered, open for writing; closed by `close`.

    Attributes:
        size: bytes of the whole file.
        error: of the first write that failed, or None.
    """

    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self.size = self._position = 0
        self.error: OSError | None = None
        self._file = file

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        written = len(data)
        if self.error is None:
            try:
                written = self._file.write(data)
            except OSError as error:
                self.error = error
        self._position += written
        self.size = max(self.size, self._position)
        return written

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        )
        return self._file.seek(self._position)

    def fsync(self) -> None:
        """Flush the file to the disk.

        Raises:
            OSError: that failed, or an earlier write did.
        """
        if self.error is not None:
            raise self.error
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()
