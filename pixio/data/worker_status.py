"""What worker processes are reading, known even after one of them has died."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.util import Finalize


class WorkerStatus:
    """What a worker process is reading, in memory that outlives the process."""

    def __init__(self) -> None:
        self._pid = multiprocessing.RawValue("q", 0)  # not torch's: they need room in /dev/shm
        self._text = multiprocessing.RawArray("c", 1024)

    @property
    def pid(self) -> int:
        """Of the process that reads; 0 before it has started."""
        return self._pid.value

    def __str__(self) -> str:
        return self._text.value.decode(errors="replace")

    def start(self) -> None:
        """Note that this process is the one that reads; it will not outlive the one that it reads for."""
        self._pid.value = os.getpid()
        if multiprocessing.parent_process():
            Finalize(None, _leave_if_orphaned, (os.getppid(),), exitpriority=100)

    def set(self, text: str) -> None:
        """Note what it reads."""
        self._text.value = text.encode(errors="backslashreplace")[: len(self._text) - 1]


def _leave_if_orphaned(parent: int) -> None:
    """Leave without handing over the last batches if nobody is there to take them: a full pipe blocks."""
    if os.getppid() != parent:
        os._exit(1)


def what_dead_workers_read(statuses: Sequence[WorkerStatus]) -> list[str]:
    """What those worker processes were reading that are no more."""
    with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD may raise the death meanwhile
        time.sleep(1)  # a dying process closes its connections a moment before it is gone
    alive = {os.getpid(), *(child.pid for child in multiprocessing.active_children())}
    return [str(status) for status in statuses if status.pid and status.pid not in alive]


@contextmanager
def worker_deaths_raised_by_next() -> Iterator[None]:
    """Keep torch from raising a worker's death wherever the main thread is just then.

    It is noticed all the same, a few seconds later: when the next batch of that worker does not come.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
