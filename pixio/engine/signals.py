"""Signals that ask a run to stop: it finishes its step, saves, and leaves with a status that says "again".

SIGUSR2 is a cluster's warning before it takes the machines back (a time limit, a preemption); SIGTERM is
somebody's wish that the run ends, be it SLURM's or a user's.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

WARNING = signal.SIGUSR2
# Exit status, "temporary failure" in sysexits.h: the run is saved and goes on when started again.
STOPPED = 75

_SIGNALS = (WARNING, signal.SIGTERM)
_received: set[int] = set()
_heeding = False


class Stopped(SystemExit):
    """The run was asked to stop and has saved everything; raised by all ranks, exit status `STOPPED`."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Inside, the signals are only noted, for `received`; forked processes (data workers) never see them."""
    global _heeding
    before, outer = {number: signal.signal(number, _note) for number in _SIGNALS}, _heeding
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # whoever started us may have held them back
    _heeding = True
    try:
        yield
    finally:
        _heeding = outer
        for number, handler in before.items():
            signal.signal(number, handler)


def received(number: int | None = None) -> bool:
    """Whether this process has received the signal, or any that asks it to stop."""
    return bool(_received) if number is None else number in _received


def _note(number: int, _) -> None:
    _received.add(number)


def _hold_back() -> None:
    # Some schedulers signal every process of a task. Held back, not ignored: workers set their own handlers.
    if _heeding:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


os.register_at_fork(after_in_child=_hold_back)
