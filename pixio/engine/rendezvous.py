"""Where the ranks of a run meet, and who is missing: at the start, or later while the others wait."""

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


def meet(place: str, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Wait until all ranks are here.

    Args:
        place: "tcp://HOST:PORT" on the machine of rank 0, "file://…" or "env://" (torchrun's own).
        rank: of this process.
        world_size: how many there are.
        timeout: how long to wait for the others.

    Returns:
        What the ranks share.

    Raises:
        OSError: rank 0 cannot listen or be reached there.
        TimeoutError: some ranks did not come; the message names them.
    """
    address = urlsplit(place)
    try:
        if address.scheme == "tcp":
            store = dist.TCPStore(
                address.hostname,
                address.port,
                is_master=rank == 0,
                timeout=timeout,
                wait_for_workers=False,
                multi_tenant=True,
            )
        else:
            store, _, _ = next(rendezvous(place, rank, world_size, timeout=timeout))
        store.set(_host_key(rank), socket.gethostname())
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if rank == 0:
            remedy = "choose another port with MASTER_PORT or --dist_url"
            raise OSError(f"rank 0 cannot wait for the others at {place} ({reason}): {remedy}") from None
        remedy = "see whether rank 0 runs, and whether its machine lets this one in"
        raise OSError(f"rank {rank} cannot reach rank 0 at {place} ({reason}): {remedy}") from None
    try:
        store.wait([_host_key(other) for other in range(world_size)], timeout)
    except dist.DistError:
        try:
            missing = [other for other in range(world_size) if not store.check([_host_key(other)])]
        except dist.DistError:
            raise TimeoutError("rank 0 has left before all ranks had come: its log says why") from None
        raise TimeoutError(
            f"{_ranks(missing, world_size)} did not come to {place} within {_minutes(timeout)}: see whether "
            "every process was started, and what those that are missing have logged"
        ) from None
    return store


class Watch:
    """Ends the run when ranks have waited too long for another, with a message that names it.

    All ranks pass the same points in the same order. One that has come past fewer of them, while this one has
    not moved for the whole timeout, is what this one waits for. A thread looks, and ends the process, because
    the waiting itself cannot be interrupted.

    Args:
        store: from `meet`.
        rank: of this process.
        world_size: how many there are.
        timeout: how long the others are waited for.

    Attributes:
        passed: how many points this rank has come past; the program counts them up.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
        self.passed = 0
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._store = store.clone()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join(timeout=10)  # it may be asking a machine that has gone

    def _run(self) -> None:
        pause = min(10.0, self._timeout.total_seconds() / 10)
        seen, looks = -1, 0  # counted, not timed: while a whole run is suspended nobody waits
        try:
            while not self._over.wait(pause):
                passed = self.passed
                looks += 1
                if passed != seen:
                    self._store.set(f"passed/{self._rank}", str(passed))
                    seen, looks = passed, 0
                waited = looks * pause > self._timeout.total_seconds()
                if waited and (missing := self._behind(passed)):
                    self._store.set("verdict", self._verdict(missing))
                if self._store.check(["verdict"]):
                    text = self._store.get("verdict").decode()
                    time.sleep(2 * pause)  # the others read it too, and this process may hold the store
                    print(f"error: {text}", file=sys.stderr, flush=True)
                    os._exit(1)
        except dist.DistError:
            return  # the process that holds the store has gone, and says why

    def _behind(self, passed: int) -> list[int]:
        """The ranks that have come past fewer points than this one."""
        keys = [f"passed/{rank}" for rank in range(self._world_size)]
        return [
            rank
            for rank, key in enumerate(keys)
            if not self._store.check([key]) or int(self._store.get(key)) < passed
        ]

    def _verdict(self, missing: Sequence[int]) -> str:
        hosts = sorted({self._store.get(_host_key(rank)).decode() for rank in missing})
        return (
            f"the other ranks have waited {_minutes(self._timeout)} for {_ranks(missing, self._world_size)} "
            f"(on {', '.join(hosts)}): see what was logged there, and whether the data can be read there. "
            "All ranks end; the same command goes on from the last checkpoint"
        )


def _host_key(rank: int) -> str:
    return f"host/{rank}"


def _ranks(numbers: Sequence[int], world_size: int) -> str:
    """ "rank 3 of 8", "ranks 3, 4, 5, 6 and 92 more of 256"."""
    some = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {some} of {world_size}"


def _minutes(timeout: timedelta) -> str:
    return f"{timeout.total_seconds() / 60:g} minutes"
