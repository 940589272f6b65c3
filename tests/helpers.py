"""What several test modules share: a tiny model to train, tars, logs, ports, launch scripts."""

import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from pixio.engine.checkpoint import materialize, read_checkpoint
from pixio.engine.runtime import Runtime

ALONE = Runtime(torch.device("cpu"))
LAUNCHER_FLAGS = (
    "job_dir",
    "job_name",
    "nodes",
    "ngpus",
    "timeout",
    "mem_gb",
    "partition",
    "account",
    "qos",
    "comment",
)


class Killed(BaseException):
    """Stands for a signal: nothing between the loop and the interpreter may catch it."""


# ------------------------------------------------------------------------------------------ tiny training


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def step_images(step: int) -> torch.Tensor:
    """All 8 samples of a step, whatever the number of ranks and micro batches that share them."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def zero(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


# ------------------------------------------------------------------------------------------ files and runs


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of these members, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def full_disk(folder) -> SimpleNamespace:
    """Stands for `shutil.disk_usage`."""
    return SimpleNamespace(free=3)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, the system refuses what would make a file larger than `size` bytes, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def read_log(run: Path) -> list[dict]:
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def latest_checkpoint(run: Path) -> dict:
    """The content of the newest checkpoint of a run."""
    name = (run / "checkpoints/latest").read_text().strip()
    return materialize(read_checkpoint(run / "checkpoints" / name))


def run_two_ranks(command: list, **variables: str) -> None:
    """Run a command as ranks 0 and 1 of this node, and wait until both have ended well."""
    shared = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **variables}
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def free_port() -> int:
    """A TCP port of this host that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def interrupt_twice(module: str, holder: str, flags: list[str]) -> tuple[int, str]:
    """Press Ctrl-C in a step of a program that never ends, and again; its exit status and stderr.

    Args:
        module: of the program.
        holder: the module whose `accumulate` is the step.
        flags: of the program.
    """
    code = (
        f"import sys, time, {module}, {holder} as holder\n"
        "holder.accumulate = lambda *_: (print('in a step', flush=True), time.sleep(600))\n"
        f"{module}.main(sys.argv[1:])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, flags)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            while process.stdout.readline() not in ("in a step\n", ""):
                pass
            process.send_signal(signal.SIGINT)
            said = ""
            while "exits at once" not in said and (line := process.stderr.readline()):
                said += line
            process.send_signal(signal.SIGINT)
            return process.wait(timeout=10), said
        finally:
            process.kill()


# ------------------------------------------------------------------------------------------ launch scripts


def echoing_programs(folder: Path, **variables: str) -> dict[str, str]:
    """Environment whose python, torchrun and sbatch only print their arguments, a line each."""
    for name in ("python", "torchrun", "sbatch"):
        (folder / name).write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        (folder / name).chmod(0o755)
    return {**os.environ, **variables, "PATH": f"{folder}:/usr/bin:/bin"}


def flags_of_script(script: Path, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The flags that a launch script gives its program, and its launcher flags by name."""
    ran = subprocess.run(["bash", script], env=environment, check=True, capture_output=True, text=True)
    words = ran.stdout.split("\n")
    flags = words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 : -1]
    launcher, others = {}, []
    while flags:
        if (name := flags[0].removeprefix("--")) in LAUNCHER_FLAGS:
            launcher[name] = flags[1]
            flags = flags[2:]
        else:
            others.append(flags.pop(0))
    return others, launcher
