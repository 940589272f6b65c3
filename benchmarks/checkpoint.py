"""Saving the state of a run in three ways: how long training stands still, and how long all of it takes.

    ours   pixio.engine.checkpoint: training goes on while a thread writes; checksums, which resuming compares
    torch  torch.save and torch.load, in the training loop
    dcp    torch.distributed.checkpoint.async_save and load: a thread writes too

    python benchmarks/checkpoint.py [--model pixio_vitb16_enc768x12h12_dec512x8h16] [--folder /scratch]

One process saves a model with its AdamW moments, on the GPU if there is one; every way flushes to the disk.
The ways take turns; printed are medians, and the stall of the first round, in which buffers are allocated.
"""

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from timing import now
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import pixio
from pixio.engine.checkpoint import Checkpoints, restore
from pixio.engine.config import option, parse
from pixio.engine.optim import make_adamw
from pixio.engine.runtime import Runtime, start_runtime


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time saving and resuming."""

    model: str = option("pixio_vits16_enc384x12h6_dec256x4h8", "pre-training model, see `pixio info`")
    folder: str | None = option(None, "where to write; a temporary folder by default")
    rounds: int = option(3, "measurements of each method, after the first", ge=1)
    device: str = option("auto", "auto, cpu, cuda, mps")


class Way:
    """A way to save `model` and `optimizer` in `folder`."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        self.model, self.optimizer, self.folder = model, optimizer, folder

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


class Ours(Way):
    def __init__(self, *arguments: Any, runtime: Runtime) -> None:
        super().__init__(*arguments)
        self.checkpoints = Checkpoints(self.folder, runtime, keep_newest=1)

    def save(self, step: int) -> Callable[[], object]:
        self.checkpoints.save(step, self.state(), wait=False)
        return self.checkpoints.wait

    def resume(self) -> None:
        restore(self.model, self.optimizer, self.checkpoints.load_latest())


class Torch(Way):
    def save(self, step: int) -> Callable[[], object]:
        self.folder.mkdir(exist_ok=True)
        with open(self.folder / "state.pth", "wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())
        return lambda: None

    def resume(self) -> None:
        state = torch.load(self.folder / "state.pth", map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Dcp(Way):
    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, step: int) -> Callable[[], object]:
        shutil.rmtree(self.folder, ignore_errors=True)
        return dcp.async_save(self.state(), checkpoint_id=self.folder).result

    def resume(self) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=self.folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


def measure(config: BenchmarkConfig, folder: Path) -> None:
    """Time all ways in turn and print what was found."""
    runtime = start_runtime(config.device, "fp32")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    model = pixio.create_model(config.model).to(runtime.device)
    optimizer = make_adamw(model, 1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # makes the moments

    run = (model, optimizer)
    ways = {
        "ours": Ours(*run, folder / "ours", runtime=runtime),
        "torch": Torch(*run, folder / "torch"),
        "dcp": Dcp(*run, folder / "dcp"),
    }
    size = 3 * sum(parameter.nbytes for parameter in model.parameters())
    print(f"{config.model}, {size / 1e6:,.0f} MB with its moments, on {runtime.device}, in {folder}")
    print(f"{'seconds':<8}{'first stall':>12}{'stall':>8}{'written':>9}{'resumed':>9}")
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for step in range(1 + config.rounds):
        for name, way in ways.items():
            began = now()
            wait = way.save(step)
            stood_still = now() - began
            wait()
            written = now() - began
            began = now()
            way.resume()
            found[name].append((stood_still, written, now() - began))
    for name, rounds in found.items():
        stall, written, resumed = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
        print(f"{name:<8}{rounds[0][0]:>12.2f}{stall:>8.2f}{written:>9.2f}{resumed:>9.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    config = parse(BenchmarkConfig)
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        measure(config, Path(folder))
