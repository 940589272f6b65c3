"""Signals that ask a run to stop: it finishes its step, saves, and exits with a status that means "again".

SIGUSR2 is a cluster's warning before it takes the nodes back (a time limit, a preemption); SIGTERM is a wish
that the run ends, be it SLURM's or a user's; SIGINT is Ctrl-C, and a second one ends the process at once.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

WARNING = signal.SIGUSR2
# Exit status, "temporary failure" in sysexits.h: the run is saved and resumes when started again.
EXIT_PREEMPTED = 75

_SIGNALS = (WARNING, signal.SIGTERM, signal.SIGINT)
_received: set[int] = set()
_deferring = False


class Preempted(SystemExit):
    """The run was asked to stop and has saved everything; raised by all ranks, exit status 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Inside, signals are only recorded, for `received`; forked processes (data workers) never see them."""
    global _deferring
    before, outer = {number: signal.getsignal(number) for number in _SIGNALS}, _deferring
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup, or a script's background process
            signal.signal(number, _record)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # the launcher may have blocked them
    _deferring = True
    try:
        yield
    finally:
        _deferring = outer
        for number, handler in before.items():
            signal.signal(number, handler)


def received(number: int | None = None) -> bool:
    """Whether this process has received the signal, or any that asks it to stop."""
    return bool(_received) if number is None else number in _received


def names() -> str:
    """The signals received, such as "SIGTERM"."""
    return " and ".join(signal.Signals(number).name for number in sorted(_received))


def _record(number: int, _) -> None:
    _received.add(number)
    if number == signal.SIGINT:
        # By the system, as no Python runs while the process waits in a collective.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nSIGINT: this step is finished and saved first; Ctrl-C again exits at once\n")


def _block() -> None:
    # Some schedulers signal every process of a task. Blocked, not ignored: workers set their own handlers.
    if _deferring:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


os.register_at_fork(after_in_child=_block)
