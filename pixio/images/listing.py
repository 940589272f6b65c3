"""Which files are images: the one rule by which folders and tars are listed everywhere."""

import heapq
import os
import warnings
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Folders that systems and tools keep beside a user's files: copies, thumbnails, what was thrown away.
_JUNK_FOLDERS = {"@eadir", "#recycle", "$recycle.bin", "__macosx", "lost+found", "system volume information"}


def is_junk(path: str | os.PathLike) -> bool:
    """Whether a relative path, of a file or of a tar's member, is never data.

    Hidden files and folders (macOS's `._NAME`, `.ipynb_checkpoints`, `.Trash-1000`) and the folders that
    systems keep (`__MACOSX`, `@eaDir`, `lost+found`, recycle bins) are not, at any depth.
    """
    parts = os.fspath(path).replace(os.sep, "/").split("/")
    hidden = any(part.startswith(".") for part in parts if part not in (".", ".."))
    return hidden or any(part.lower() in _JUNK_FOLDERS for part in parts)


def list_files(root: str | os.PathLike, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """List the files in and below a folder, but for junk (see `is_junk`).

    Links are followed, and a folder that several paths lead to is listed once: under its own path, else
    under the link that sorts first. So a link to a parent folder adds nothing.

    Args:
        root: folder; its own path may be hidden.
        suffixes: in lower case; files with one of them, in any case, are listed.

    Returns:
        Paths relative to `root`, sorted, links without a target among them: reading those is an error.

    Warns:
        UserWarning: a folder that cannot be listed and is left out.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()  # relative, ending in a separator; links wait until no folder is left
    while folders or links:
        folder = folders.pop() if folders else heapq.heappop(links)
        place = Path(root, folder)
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                for entry in entries:
                    if is_junk(entry.name):
                        continue
                    inside, link = f"{folder}{entry.name}{os.sep}", entry.is_symlink()
                    if link and os.path.isdir(entry.path):
                        heapq.heappush(links, inside)
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(inside)
                    elif entry.name.lower().endswith(suffixes) and (link or entry.is_file()):
                        found.append(folder + entry.name)
        except OSError as error:
            warnings.warn(f"{place} cannot be listed and is left out: {error.strerror}", stacklevel=2)
    return sorted(found)
