"""One run per folder: a lock file that names its holder, and that a dead holder loses on any file system.

flock would not do: some network file systems keep the lock of a node that died, others know none.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from pixio.engine import signals
from pixio.engine.program import explain
from pixio.engine.ranks import Collectives
from pixio.files import read_json, write_json

RENEWAL = 10.0  # seconds between two heartbeats of a holder
PATIENCE = 60.0  # seconds without one after which a holder counts as dead; file systems may show it late


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike, runtime: Collectives) -> Iterator[None]:
    """Collective: keep other runs out of `folder`, which is made if missing, while inside.

    Raises:
        OSError: on every rank, when another run holds it; the message names its host, process and start.
        Preempted: on every rank, when a signal came while rank 0 waited to see whether the holder lives.
    """
    lock, failure, preempted = None, "", False
    if runtime.is_main:
        try:
            lock = _Lock(Path(folder).absolute())
        except OSError as error:
            failure = explain(error)
        except signals.Preempted:
            preempted = True
    failure, preempted = runtime.gather((failure, preempted))[0]
    if preempted:
        raise signals.Preempted
    if failure:
        raise OSError(failure)
    try:
        yield
    finally:
        if lock:
            lock.release()


class _Lock:
    """`run.lock`, whose modification time a thread of its holder renews as a heartbeat.

    Whether a holder on this node is alive is asked of the system; one elsewhere is if its heartbeat goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._path, pid = folder / "run.lock", os.getpid()
        self._mine = {
            "host": socket.gethostname(),
            "pid": pid,
            "since": datetime.now().astimezone().isoformat(" ", "seconds"),
            "born": _start_time(pid),
            "processes": _process_table(),
            "id": uuid.uuid4().hex,
        }
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            try:
                write_json(self._path, self._mine)
            except OSError:  # a full disk: an empty lock would make the next run wait
                self._path.unlink(missing_ok=True)
                raise
        except FileExistsError:
            if not self._is_held():
                write_json(self._path, self._mine)
                time.sleep(0.5)  # of several that replace a dead lock at once, the last one gets it
            if (holder := self._holder()) != self._mine:
                who, since = f"pid {holder.get('pid')} on {holder.get('host')}", holder.get("since")
                raise OSError(
                    f"{folder} is in use by another run ({who}, since {since}): wait until it ends, stop it, "
                    "or choose another output folder"
                ) from None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let other runs in."""
        self._released.set()
        self._thread.join()
        if self._holder() == self._mine:
            self._path.unlink(missing_ok=True)
        if self._made:
            with contextlib.suppress(OSError):  # it holds something
                self._path.parent.rmdir()

    def _holder(self) -> dict[str, Any]:
        try:
            return read_json(self._path)
        except ValueError:  # about to be written, or gone
            return {}

    def _is_held(self) -> bool:
        holder = self._holder()
        if holder.get("processes") == self._mine["processes"]:
            return _start_time(holder["pid"]) == holder["born"]
        touched, deadline = self._touched(), time.monotonic() + PATIENCE
        print(f"waiting up to {PATIENCE:g} s to see whether {self._path} is still held", file=sys.stderr)
        while time.monotonic() < deadline and self._path.exists():
            if self._touched() != touched:
                return True
            if signals.received():
                raise signals.Preempted
            time.sleep(0.2)
        return False

    def _touched(self) -> int:
        with contextlib.suppress(OSError), open(self._path) as file:  # opened, so that NFS asks its server
            return os.fstat(file.fileno()).st_mtime_ns
        return 0

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL):
            holder = self._holder()
            if holder and holder != self._mine:  # this run was suspended for longer than others wait
                print(f"error: another run has taken over {self._path.parent}", file=sys.stderr, flush=True)
                os._exit(1)
            with contextlib.suppress(OSError):
                os.utime(self._path)


def _process_table() -> str:
    """What distinguishes the processes that this one can see from those of other nodes and containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return uuid.uuid4().hex


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None where it has ended."""
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else values[18]
