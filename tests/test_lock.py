"""One run per folder: who holds it is named, and what a dead run left does not block."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
from helpers import ALONE

from pixio.engine import lock as lock_module
from pixio.engine.lock import lock_folder
from pixio.engine.ranks import Collectives

HOLD = """
import sys, torch
from pixio.engine.lock import lock_folder
from pixio.engine.runtime import Runtime
with lock_folder(sys.argv[1], Runtime(torch.device("cpu"))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def rewrite(folder, **changes) -> None:
    path = folder / "run.lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_second_run_is_refused_naming_host_process_and_start(tmp_path, holder):
    expected = rf"in use by another run \(pid {holder.pid} on {socket.gethostname()}, since 20\d\d-"
    with pytest.raises(OSError, match=expected), lock_folder(tmp_path, ALONE):
        pass
    holder.communicate("")
    assert holder.returncode == 0
    with lock_folder(tmp_path, ALONE):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_run_does_not_block(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with lock_folder(tmp_path, ALONE):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_process_that_got_the_number_of_a_dead_run_does_not_block(tmp_path, holder):
    rewrite(tmp_path, born="1")
    with lock_folder(tmp_path, ALONE):
        pass


def test_a_run_elsewhere_blocks_as_long_as_it_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "PATIENCE", 3.0)
    (tmp_path / "run.lock").write_text(
        json.dumps({"host": "n7", "pid": 5, "since": "today", "processes": "its"})
    )
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.5):
            os.utime(tmp_path / "run.lock")

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(OSError, match="pid 5 on n7, since today"), lock_folder(tmp_path, ALONE):
        pass
    ended.set()
    thread.join()
    with lock_folder(tmp_path, ALONE):  # it has died
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_signal_while_rank_0_waits_for_a_lock_stops_all_ranks(tmp_path, monkeypatch):
    gathered = []

    class Rank(Collectives):
        """One of two ranks: what rank 0 tells is kept for rank 1."""

        def gather(self, value):
            gathered.append(value)
            return gathered[:1]

    (tmp_path / "run.lock").write_text("")
    monkeypatch.setattr(lock_module.signals, "received", lambda: True)
    for rank in (0, 1):
        ranks = Rank(torch.device("cpu"), rank=rank, world_size=2)
        with pytest.raises(lock_module.signals.Preempted), lock_folder(tmp_path, ranks):
            pass


def test_a_lock_that_was_cut_short_does_not_block(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "PATIENCE", 1.0)
    (tmp_path / "run.lock").write_text("")
    with lock_folder(tmp_path, ALONE):
        pass


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "run.lock")

    monkeypatch.setattr(lock_module, "write_json", full)
    with pytest.raises(OSError, match="No space left"), lock_folder(tmp_path, ALONE):
        pass
    assert not (tmp_path / "run.lock").exists()


def test_a_run_whose_lock_was_taken_over_ends(tmp_path, monkeypatch):
    exits = threading.Event()
    monkeypatch.setattr(lock_module, "RENEWAL", 0.1)
    monkeypatch.setattr(os, "_exit", lambda _: exits.set())
    with lock_folder(tmp_path, ALONE):
        rewrite(tmp_path, id="another")
        assert exits.wait(10)


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ValueError, match="no data"), lock_folder(tmp_path / "new", ALONE):
        raise ValueError("no data")
    assert not (tmp_path / "new").exists()
