"""The rendezvous of the ranks, and a watchdog over them and their GPUs: both name who is missing."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from urllib.parse import SplitResult, urlsplit

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous as open_store

from pixio.engine import signals


def rendezvous(address: str, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Wait until all ranks have come, or until a signal asks this one to stop.

    Args:
        address: "tcp://HOST:PORT" on the node of rank 0, "file:///PATH" or "env://" (torchrun's own).
        timeout: how long to wait for the others.

    Returns:
        The key-value store that the ranks share.

    Raises:
        ValueError: the address is incomplete.
        OSError: rank 0 cannot listen at, or this rank cannot reach, the address.
        TimeoutError: some ranks did not come; the message names them.
        Preempted: a signal came first.
    """
    url = _parse(address)
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        if url.scheme == "tcp":
            assert url.hostname is not None
            assert url.port is not None
            if rank > 0 and not _poll(partial(_listens, url.hostname, url.port), deadline):
                raise dist.DistNetworkError(f"nobody listened there within {_minutes(timeout)}")
            store = dist.TCPStore(
                url.hostname,
                url.port,
                is_master=rank == 0,
                timeout=timeout,
                wait_for_workers=False,
                multi_tenant=True,
            )
        else:
            store, _, _ = next(open_store(address, rank, world_size, timeout=timeout))
        store.set(_host_key(rank), socket.gethostname())
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if rank == 0:
            remedy = "choose another port with MASTER_PORT or --dist_url"
            raise OSError(f"rank 0 cannot wait for the others at {address} ({reason}): {remedy}") from None
        remedy = "see whether rank 0 runs, and whether its node accepts connections from this one"
        raise OSError(f"rank {rank} cannot reach rank 0 at {address} ({reason}): {remedy}") from None
    hosts = [_host_key(other) for other in range(world_size)]
    try:
        if _poll(lambda: store.check(hosts), deadline):
            return store
        missing = [other for other in range(world_size) if not store.check([hosts[other]])]
    except dist.DistError:
        raise TimeoutError("rank 0 has left before all ranks had come: its log says why") from None
    raise TimeoutError(
        f"{_name_ranks(missing, world_size)} did not come to {address} within {_minutes(timeout)}: see "
        "whether every process was started, and what the missing ones have logged"
    )


def _parse(address: str) -> SplitResult:
    url = urlsplit(address)
    with contextlib.suppress(ValueError):  # of the port
        known = all(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
        if {"tcp": url.hostname and url.port, "file": url.path, "env": known}.get(url.scheme):
            return url
    raise ValueError(
        f"no rendezvous at {address}: set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port "
        "there, or give --dist_url tcp://HOST:PORT"
    )


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _poll(ready: Callable[[], bool], deadline: float) -> bool:
    """Whether `ready` came true before the deadline; in Python, so that signals are handled meanwhile."""
    pause = 0.05
    while not ready():
        if signals.received():
            print(
                f"{signals.names()} received while waiting for the other ranks", file=sys.stderr, flush=True
            )
            raise signals.Preempted
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)
    return True


class Watchdog:
    """Ends the run when ranks have waited too long for another, or for its GPU, with a message that names it.

    All ranks pass the same points of the program in the same order, and count them as heartbeats. A rank
    with fewer of them, while this one has made no progress for the whole timeout, is what this one waits for.
    Where all have as many and this one's device does not finish its work, the devices are compared. A thread
    watches, and ends the process, because the waiting itself cannot be interrupted.

    Args:
        store: from `rendezvous`.
        timeout: how long ranks may wait for another.
        mark: records an event in the work queued on the device; what it returns tells whether the device has
            reached it. None on CPUs, where no work is queued.

    Attributes:
        heartbeats: how many points this rank has passed.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout: timedelta,
        mark: Callable[[], Callable[[], bool]] | None = None,
    ) -> None:
        self.heartbeats = 0
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._mark = mark
        self._marks: deque[tuple[int, Callable[[], bool]]] = deque()  # events not yet reached
        self._store = store.clone()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Count another point; only from the thread that queues work on the device."""
        self.heartbeats += 1
        if self._mark is not None:
            self._marks.append((self.heartbeats, self._mark()))

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join(timeout=10)  # it may be waiting for a node that is gone

    def _watch(self) -> None:
        pause = min(10.0, self._timeout.total_seconds() / 10)
        # Idle checks are counted, not timed: while a whole run is suspended, nobody waits.
        passed, last, idle = 0, None, 0
        try:
            while not self._closed.wait(pause):
                heartbeats = self.heartbeats
                while self._marks and self._marks[0][1]():
                    passed, _ = self._marks.popleft()
                idle += 1
                if (heartbeats, passed) != last:
                    self._store.set(f"heartbeats/{self._rank}", str(heartbeats))
                    self._store.set(f"device/{self._rank}", str(passed))
                    last, idle = (heartbeats, passed), 0
                waited = idle * pause > self._timeout.total_seconds()
                if waited and (verdict := self._verdict(heartbeats)):
                    self._store.set("verdict", verdict)
                if self._store.check(["verdict"]):
                    text = self._store.get("verdict").decode()
                    time.sleep(2 * pause)  # the others read it too, and this process may hold the store
                    print(f"error: {text}", file=sys.stderr, flush=True)
                    os._exit(1)
        except RuntimeError:  # `DistError` is one
            return  # the process that holds the store has ended, or the device has failed, and says why

    def _verdict(self, heartbeats: int) -> str | None:
        """What this rank waits for; None: it waits for nobody."""
        end = "All ranks end; the same command resumes the run"
        if missing := self._behind("heartbeats", heartbeats):
            return (
                f"the other ranks have waited {_minutes(self._timeout)} for {self._names(missing)}: see what "
                f"was logged there and whether the data can be read there. {end}"
            )
        if not self._marks:
            return None
        reached = self._counts("device")
        if missing := self._behind("device", max(reached)):
            who = f"the GPU of {self._names(missing)} has not finished what the others have"
        else:
            who = f"no GPU finishes its work: one of {self._world_size}, or the network, hangs"
        where = "see what nvidia-smi and the kernel's log (dmesg, Xid) say there"
        return f"{who}, for {_minutes(self._timeout)}: {where}. {end}"

    def _counts(self, what: str) -> list[int]:
        """The last count that each rank has published; -1 before the first."""
        keys = [f"{what}/{rank}" for rank in range(self._world_size)]
        return [int(self._store.get(key)) if self._store.check([key]) else -1 for key in keys]

    def _behind(self, what: str, count: int) -> list[int]:
        """The ranks with a lower number."""
        return [rank for rank, found in enumerate(self._counts(what)) if found < count]

    def _names(self, ranks: Sequence[int]) -> str:
        hosts = sorted({self._store.get(_host_key(rank)).decode() for rank in ranks})
        return f"{_name_ranks(ranks, self._world_size)} (on {', '.join(hosts)})"


def _host_key(rank: int) -> str:
    return f"host/{rank}"


def _name_ranks(ranks: Sequence[int], world_size: int) -> str:
    """ "rank 3 of 8", "ranks 3, 4, 5, 6 and 92 more of 256"."""
    some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {some} of {world_size}"


def _minutes(timeout: timedelta) -> str:
    return f"{timeout.total_seconds() / 60:g} minutes"
