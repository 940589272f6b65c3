"""A small disk of a process's own, which becomes full or read-only; see `kills.py`."""

import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

_CLONE_NEWNS = 0x20000  # linux/sched.h: what is mounted ends with this process


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A disk of `size` MiB on `folder`, and a /dev/shm, of this process alone; yields whether it may."""
    mounted = ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0
    if mounted:
        _call("mount", "--make-rprivate", "/")
        _call("mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder))
        _call("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")  # so that what is left there is known to be ours
    try:
        yield mounted
    finally:
        if mounted:
            _call("umount", "--lazy", str(folder))


def fill(folder: Path, left: int) -> Callable[[], None]:
    """Leave so many bytes on the disk of a folder; returns what frees it again."""
    ballast = folder / "ballast"
    with open(ballast, "wb") as file:
        for _ in range(100):  # the run may write meanwhile
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(folder).free - left, 1))
                break
    return ballast.unlink


def limit_files(processes: Sequence[int], size: int) -> None:
    """Let no file of these processes become larger, in place of a full disk."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def refuse(folder: Path, mounted: bool) -> Callable[[], None]:
    """Let nobody write into a folder, of a disk that was mounted or not; returns what allows it again."""
    if not mounted:
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        return partial(folder.chmod, mode)
    release = partial(_call, "umount", "--lazy", str(folder))
    for left in reversed(range(20)):
        _call("mount", "--bind", str(folder), str(folder))
        try:
            _call("mount", "-o", "remount,ro,bind", str(folder))
            break
        except subprocess.CalledProcessError:  # the run has just opened a file there
            release()
            if not left:
                raise
    return release


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
