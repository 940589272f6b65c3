"""What worker processes are reading, known even after one of them has died."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


class WorkerStatus:
    """What a worker process is reading, in memory that outlives the process."""

    def __init__(self) -> None:
        self._pid = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._text = torch.zeros(1024, dtype=torch.uint8).share_memory_()

    @property
    def pid(self) -> int:
        """Of the process that reads; 0 before it has started."""
        return self._pid.item()

    def __str__(self) -> str:
        return self._text.numpy().tobytes().split(b"\0")[0].decode(errors="replace")

    def start(self) -> None:
        """Note that this process is the one that reads."""
        self._pid[0] = os.getpid()

    def set(self, text: str) -> None:
        """Note what it reads."""
        data = text.encode(errors="replace")[: len(self._text) - 1] + b"\0"
        self._text.numpy()[: len(data)] = np.frombuffer(data, np.uint8)


def what_dead_workers_read(statuses: Sequence[WorkerStatus]) -> list[str]:
    """What those worker processes were reading that are no more."""
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
