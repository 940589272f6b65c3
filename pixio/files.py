"""Files that are whole or absent, and JSON: what every room that writes stands on."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON = 2**24  # bytes; the index of the largest model has 0.1 MB


def write_atomic(path: str | os.PathLike, writer: Callable[[BinaryIO], object]) -> None:
    """Write a file that is never seen incomplete: `writer` fills a temporary one, which is then renamed.

    Args:
        path: the file to make or replace; its folder exists.
        writer: called once with the binary file to write to.

    Raises:
        OSError: the disk refused; `path` is what it was and nothing is left beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file; see `write_atomic`."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file that people can read, ending in a newline; see `write_atomic`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file, which may be anybody's.

    Raises:
        ValueError: too large, unreadable, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes, at most {MAX_JSON:,} expected")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


@contextmanager
def temporary_path(target: Path) -> Iterator[Path]:
    """A path to write a file or folder to (and files beside it), which move to `target` once complete."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder) / target.name
        for made in sorted(Path(folder).iterdir(), reverse=True):  # what the target refers to comes first
            os.replace(made, target.parent / made.name)
    fsync_folder(target.parent)


def fsync_folder(folder: Path) -> None:
    """Names of new files reach the disk too; not every system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
