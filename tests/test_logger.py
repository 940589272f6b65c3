"""log.jsonl, progress, TensorBoard and Weights & Biases."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import largest_file

from pixio.engine import logger as logs_module
from pixio.engine.logger import Log


def lines(folder: Path) -> list[dict]:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()
    ]


def test_the_first_every_nth_and_the_last_step_are_logged(tmp_path):
    log = Log(tmp_path, total_steps=11, is_main=True, every=5)
    for step in range(1, 12):
        log.step(step, images=step * 8, loss=torch.tensor(0.5), memory_gib=lambda: 2.0, data={"damaged": 3})
    log.close()
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [1, 5, 10, 11]
    assert rows[1]["images"] == 40
    assert rows[1]["loss"] == 0.5
    assert rows[1]["memory_gib"] == 2.0
    assert rows[1]["data"] == {"damaged": 3}


def test_throughput_and_data_wait_are_those_since_the_line_before(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 2))  # 2 s from one logged line to the next
    monkeypatch.setattr(logs_module._Progress, "show", lambda *_: None)
    monkeypatch.setattr(logs_module._Progress, "advance", lambda *_: None)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    log = Log(tmp_path, total_steps=8, is_main=True, start_step=2, every=2)
    for step in range(3, 9):
        log.step(step, images=step * 10, data_wait=0.25)
    log.close()
    rows = lines(tmp_path)
    assert [row["images_per_second"] for row in rows] == [5.0, 10.0, 10.0]
    assert [row["data_wait_share"] for row in rows] == [0.125, 0.25, 0.25]


def test_nothing_leaves_the_device_between_logged_steps(tmp_path):
    log = Log(tmp_path, total_steps=10, is_main=True, every=5)
    log.step(1, images=1, loss=1.0)
    log.step(2, images=2, loss=lambda: pytest.fail("read between logged steps"))
    log.close()


def test_numbers_that_are_not_finite_are_logged_as_null(tmp_path):
    log = Log(tmp_path, total_steps=2, is_main=True)
    log.step(1, images=1, loss=torch.tensor(math.nan), grad_norm=math.inf)
    log.close()
    (row,) = lines(tmp_path)
    assert row["loss"] is None
    assert row["grad_norm"] is None


def test_lines_beyond_the_resumed_step_are_dropped(tmp_path):
    log = Log(tmp_path, total_steps=6, is_main=True, every=1)
    for step in range(1, 6):
        log.step(step, images=step)
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 1, "ima')  # cut off by a kill
    log = Log(tmp_path, total_steps=6, is_main=True, start_step=3, every=1)
    log.step(4, images=44)
    log.close()
    assert [(row["step"], row["images"]) for row in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 44)]


def test_other_ranks_write_nothing(tmp_path):
    log = Log(tmp_path / "run", total_steps=2, is_main=False)
    log.step(1, images=1, loss=1.0)
    log.close()
    assert not (tmp_path / "run").exists()


def test_progress_in_a_file_is_a_bounded_number_of_readable_lines(tmp_path, capsys, monkeypatch):
    clock = iter(range(100_000))  # a second passes whenever somebody looks
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    log = Log(tmp_path, total_steps=100, is_main=True, every=1)
    for step in range(1, 101):
        log.step(step, images=step, loss=0.5, lr=1e-4)
    log.close()
    printed = capsys.readouterr().out.splitlines()
    assert 10 < len(printed) < 40
    assert printed[0] == f"100 steps, in {tmp_path}; Ctrl-C saves, the same command resumes"
    assert printed[1] == "step 1/100: loss 0.5, lr 0.0001"
    assert printed[2].endswith("left")
    assert printed[-1].startswith("step 100/100: ")


def test_progress_on_a_terminal_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = Log(tmp_path, total_steps=4, is_main=True, start_step=2, every=1)
    log.step(3, images=3, loss=0.5)
    log.step(4, images=4, loss=0.25)
    log.close()
    captured = capsys.readouterr()
    assert captured.out.startswith("resumed after step 2 of 4, in ")
    assert "4/4" in captured.err
    assert "loss 0.25" in captured.err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_report_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setattr(logs_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        Log(tmp_path, total_steps=1, is_main=False, **{name: True})


class Client:
    """Weights & Biases as far as it is used; keeps what it receives."""

    __spec__ = object()

    def __init__(self) -> None:
        self.started, self.received = [], []

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, row, step):
        self.received.append((step, row))

    def finish(self):
        self.received.append("finished")


@pytest.fixture
def wandb(monkeypatch) -> Client:
    client = Client()
    monkeypatch.setitem(sys.modules, "wandb", client)
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return client


def test_weights_and_biases_receives_the_numbers_of_each_logged_line(tmp_path, wandb):
    log = Log(tmp_path, total_steps=5, is_main=True, wandb=True)
    log.step(1, images=8, loss=0.5, data={"damaged": 3}, note="text")
    log.close()
    expected = {"step": 1, "images": 8, "loss": 0.5, "data/damaged": 3}
    assert wandb.received == [(1, expected), "finished"]


def test_a_requeued_run_stays_one_run_of_weights_and_biases(tmp_path, wandb):
    for folder, start_step in (("a", 0), ("a", 3), ("b", 0)):
        Log(tmp_path / folder, 5, is_main=True, start_step=start_step, wandb=True).close()
    first, resumed, other = wandb.started
    assert first["id"] == resumed["id"] != other["id"]
    assert {(run["project"], run["resume"]) for run in wandb.started} == {("pixio", "allow")}


def test_the_environment_of_weights_and_biases_wins(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    Log(tmp_path, 5, is_main=True, wandb=True).close()
    assert (wandb.started[0]["project"], wandb.started[0]["id"]) == ("mine", "abc")


def test_a_service_that_does_not_start_is_one_line_and_training_goes_on(tmp_path, wandb, monkeypatch, capsys):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty).\n  call wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", refuse)
    log = Log(tmp_path, total_steps=5, is_main=True, every=1, wandb=True)
    log.step(1, images=8, loss=0.5)
    log.close()
    said = capsys.readouterr().err
    expected = "Weights & Biases cannot be written, training continues: api_key not configured (no-tty). call"
    assert said.startswith(expected)
    assert said.count("\n") == 1
    assert '"loss": 0.5' in (tmp_path / "log.jsonl").read_text()


def test_a_service_that_fails_is_reported_once_and_ends_nothing(tmp_path, wandb, monkeypatch, capsys):
    log = Log(tmp_path, total_steps=5, is_main=True, every=1, wandb=True)
    monkeypatch.setattr(wandb, "log", lambda *_, **__: 1 / 0)
    for step in range(1, 6):
        log.step(step, images=step)
    log.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("Weights & Biases cannot be written, training continues") == 1


def test_a_line_that_does_not_fit_on_the_disk_is_left_out_whole(tmp_path, capsys):
    log = Log(tmp_path, total_steps=9, is_main=True, every=1)
    log.step(1, images=1)
    size = (tmp_path / "log.jsonl").stat().st_size
    with largest_file(size + 10):
        for step in (2, 3):
            log.step(step, images=step)
    log.step(4, images=4)
    log.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 4]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'log.jsonl'} cannot be written, training continues")
    assert "bytes needed" in line
