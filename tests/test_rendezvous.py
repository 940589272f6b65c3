"""Ranks that hang, stay away or are suspended, in real processes."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from helpers import free_port

from pixio.engine import rendezvous as rendezvous_module
from pixio.engine.rendezvous import Watchdog

pytestmark = pytest.mark.slow

HANG = """
import sys, time
import torch
from torch import nn
from pixio.engine.optim import make_adamw
from pixio.engine.runtime import start_runtime
from pixio.engine.step import accumulate

rank, world_size, port, minutes, instant = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
try:
    address = f"tcp://127.0.0.1:{port}"
    runtime = start_runtime("cpu", "fp32", world_size, rank, address, timeout_minutes=float(minutes))
except OSError as error:
    sys.exit(str(error))

def hang(when):
    if rank == 1 and instant == when:
        time.sleep(300)

def loss_fn(model, batch):
    hang("forward")
    return model(batch).square().mean()

model = nn.Linear(2, 2)
optimizer = make_adamw(model, 1e-2)
wrapped = runtime.wrap(model)
for step in range(2):
    hang("data")
    accumulate(runtime, wrapped, optimizer, runtime.make_scaler(), [torch.ones(2, 2)], loss_fn)
    runtime.any(False)
hang("end")
runtime.close()
"""


def run_ranks(
    started: int, world_size: int, minutes: float, instant: str, first: int = 0
) -> list[tuple[int, str]]:
    """Exit status and last words of each of the ranks that are started."""
    words = [str(word) for word in (world_size, free_port(), minutes, instant)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", HANG, str(rank), *words], stderr=subprocess.PIPE, text=True)
        for rank in range(first, first + started)
    ]
    try:
        return [(rank.wait(timeout=120), rank.stderr.read()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("instant", ["data", "forward"])
def test_a_rank_that_hangs_is_named_and_ends_all(instant):
    """Before its step, or in the middle of it, while the other waits to exchange gradients."""
    for status, said in run_ranks(2, 2, 0.1, instant):
        assert status == 1
        assert "have waited 0.1 minutes for rank 1 of 2" in said
        assert socket.gethostname() in said


def test_ranks_that_do_not_come_are_named():
    first, second = run_ranks(2, 4, 0.1, "never")
    assert (first[0], second[0]) == (1, 1)
    assert "ranks 2, 3 of 4 did not come" in first[1]
    assert "ranks 2, 3 of 4 did not come" in second[1] or "rank 0 has left" in second[1]


def test_a_rank_that_cannot_reach_the_first_says_where_it_looked():
    ((status, said),) = run_ranks(1, 2, 0.02, "never", first=1)
    assert status == 1
    assert "rank 1 cannot reach rank 0 at tcp://127.0.0.1:" in said


def test_ranks_that_only_end_at_different_times_are_not_mistaken_for_missing():
    assert [status for status, _ in run_ranks(2, 2, 0.1, "never")] == [0, 0]


@pytest.mark.parametrize(
    "address", ["tcp://host", "tcp://host:99999", "tcp://host:x", "file://", "host:1", "env://"]
)
def test_an_incomplete_address_is_refused(address, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        ValueError, match=f"no rendezvous at {address}.*MASTER_PORT.*--dist_url tcp://HOST:PORT"
    ):
        rendezvous_module.rendezvous(address, 0, 2, timedelta(seconds=1))


WAIT = """
import sys
from pixio.engine.runtime import start_runtime
from pixio.engine.signals import defer_signals
with defer_signals():
    print("ready", flush=True)
    start_runtime("cpu", "fp32", 2, int(sys.argv[1]), f"tcp://127.0.0.1:{sys.argv[2]}")
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_rank_that_waits_for_others_heeds_signals(rank, number):
    command = [sys.executable, "-c", WAIT, str(rank), str(free_port())]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(number)
        try:
            assert process.wait(timeout=30) == 75
        finally:
            process.kill()


class FakeStore(dict):
    """A store as far as `Watchdog` uses one."""

    get = dict.__getitem__

    def clone(self) -> "FakeStore":
        return self

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_a_run_that_was_suspended_as_a_whole_is_not_mistaken_for_a_hanging_one(monkeypatch):
    hours, ended = itertools.count(step=3600), []
    clock = SimpleNamespace(monotonic=lambda: next(hours), sleep=lambda _: None)
    monkeypatch.setattr(rendezvous_module, "time", clock)
    monkeypatch.setattr(os, "_exit", ended.append)
    watchdog = Watchdog(FakeStore({"host/1": b"n1", "heartbeats/1": b"-1"}), 0, 2, timedelta(seconds=2))
    time.sleep(0.9)  # it has looked four times
    watchdog.close()
    assert not ended


@pytest.mark.parametrize(
    ("reached", "said"),
    [
        ([1, 0, 1], r"the GPU of rank 1 of 3 \(on n1\) has not finished what the others have, for 0\.01 min"),
        ([1, 1, 1], r"no GPU finishes its work: one of 3, or the network, hangs, for 0\.01 min"),
    ],
)
def test_a_gpu_that_hangs_while_all_programs_wait_is_named(reached, said, monkeypatch, capsys):
    """All ranks pass two points; their devices come to as many of them as `reached` says."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    store = FakeStore({f"host/{rank}": f"n{rank}".encode() for rank in range(3)})
    watchdogs = []
    for rank, count in enumerate(reached):
        marks = iter([lambda: True] * count + [lambda: False] * 2)
        watchdogs.append(Watchdog(store, rank, 3, timedelta(minutes=0.01), lambda marks=marks: next(marks)))
        watchdogs[-1].beat()
        watchdogs[-1].beat()
    deadline = time.monotonic() + 20
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    for watchdog in watchdogs:
        watchdog.close()
    assert set(ended) == {1}
    assert re.search(said, capsys.readouterr().err)


def test_programs_that_wait_for_anything_but_their_devices_are_left_alone(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    store = FakeStore({f"host/{rank}": b"n" for rank in range(2)})
    watchdogs = [Watchdog(store, rank, 2, timedelta(seconds=0.2), lambda: lambda: True) for rank in range(2)]
    for watchdog in watchdogs:
        watchdog.beat()
    time.sleep(1)
    for watchdog in watchdogs:
        watchdog.close()
    assert not ended
