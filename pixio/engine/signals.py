"""Signals that ask a run to stop: it finishes its step, saves, and exits with a status that means "again".

SIGUSR2 is a cluster's warning before it takes the nodes back (a time limit, a preemption); SIGTERM is a wish
that the run ends, be it SLURM's or a user's; SIGINT is Ctrl-C, and a second one ends the process at once.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

WARNING = signal.SIGUSR2
# Exit status, "temporary failure" in sysexits.h: the run is saved and resumes when started again.
EXIT_PREEMPTED = 75

_SIGNALS = (WARNING, signal.SIGTERM, signal.SIGINT)
_received: set[int] = set()
_deferring = False
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_end_workers = False
_workers_end_with: int | None = None  # process whose death ends the workers forked now


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
        with suppress(OSError):  # Ctrl-C has also ended the `tee` that stderr is piped to
            os.write(2, b"\nSIGINT: this step is finished and saved first; Ctrl-C again exits at once\n")


@contextmanager
def call_if_stuck(action: Callable[[], object], grace: float) -> Iterator[None]:
    """Inside, call `action` in a thread `grace` seconds after a warning, if the program is still there.

    One that waits for a device or for another rank never comes to handle the warning itself.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    ended = threading.Event()

    def watch() -> None:
        while WARNING not in (numbers := os.read(receiver, 64)):
            if 0 in numbers:
                return
        if not ended.wait(grace):
            action()

    # The C handler writes the signal's number there at once, whatever the main thread waits for.
    before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="warning", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.write(sender, b"\0")  # closing would not do: forked workers hold this end too
        watcher.join()
        os.close(receiver)
        os.close(sender)


def end_workers_with_this_process() -> None:
    """From now on processes forked by the main thread (data workers) die with this one, even if it is killed.

    One that lived on would keep the memory of a GPU, whose handle it has inherited. On Linux only.
    """
    global _end_workers
    _end_workers = True


def _before_fork() -> None:
    # The system watches the thread that forks: for one that may end before the process nothing can be asked.
    global _workers_end_with
    by_main = threading.current_thread() is threading.main_thread()
    _workers_end_with = os.getpid() if _end_workers and by_main else None


def _prepare_worker() -> None:
    # Some schedulers signal every process of a task. Blocked, not ignored: workers set their own handlers.
    if _deferring:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if _workers_end_with and _libc:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _workers_end_with:  # it has died meanwhile
            os._exit(1)


os.register_at_fork(before=_before_fork, after_in_child=_prepare_worker)
