"""What a run reports: `log.jsonl` and progress always, TensorBoard and Weights & Biases when asked for."""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixio.files import write_atomic

_SECONDS_BETWEEN_LINES = 10.0  # where the output is a file, a line per logged step would bury everything else


class Log:
    """Records a run step by step; only rank 0 writes, and device scalars are read on logged steps only.

    Logged are the first step of the run, every `every`-th and the last. A line of `log.jsonl` is an object
    with `step`, `images`, the values given, and `images_per_second` and `data_wait_share` since the line
    before (null on the first after a start). Numbers that are not finite become null, as JSON asks.

    Args:
        folder: where `log.jsonl` is; made when missing.
        total_steps: steps of the whole run.
        is_main: whether this rank writes.
        start_step: steps taken when the run was resumed; lines beyond it are dropped.
        every: steps between logged steps.
        tensorboard: also write TensorBoard events into `folder`.
        wandb: also report to Weights & Biases, which reads its own environment variables.
        config: settings of the run for Weights & Biases.

    Raises:
        ValueError: on every rank, when TensorBoard or Weights & Biases is asked for and not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        total_steps: int,
        is_main: bool,
        start_step: int = 0,
        every: int = 20,
        tensorboard: bool = False,
        wandb: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"log every 1 step or more, found {every}")
        for name, wanted in (("tensorboard", tensorboard), ("wandb", wandb)):
            if wanted and importlib.util.find_spec(name) is None:
                raise ValueError(f"--{name} needs a package that is not installed: pip install {name}")
        self.total_steps = total_steps
        self.is_main = is_main
        self.every = every
        if not is_main:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        if path.exists():
            _drop_lines_after(path, start_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._progress = _Progress(total_steps, start_step)
        self._sinks: list[Callable[[int, dict[str, float]], object]] = []
        self._closers = [self._file.close, self._progress.close]
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder), purge_step=start_step + 1)
            self._sinks.append(lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items()])
            self._closers.append(writer.close)
        if wandb:
            import wandb as client

            run = client.init(dir=str(folder), name=folder.resolve().name, config=config)
            self._sinks.append(lambda step, row: run.log(row, step=step))
            self._closers.append(run.finish)
        self._last: tuple[float, int] | None = None  # time and images seen at the line before
        self._waited = 0.0

    def step(self, step: int, images: int, data_wait: float = 0.0, **values: Any) -> None:
        """Report that `step` steps have been taken.

        Args:
            step: optimizer steps so far; the first call of a run says 1.
            images: images seen so far, over all ranks.
            data_wait: seconds this step waited for its data.
            values: what else to log, by name: numbers, scalar tensors, text, dictionaries of these, or
                functions without arguments that give one, called on logged steps only.
        """
        if not self.is_main:
            return
        self._waited += data_wait
        if step == 1 or step % self.every == 0 or step == self.total_steps:
            row = {"step": step, "images": images} | {name: _plain(value) for name, value in values.items()}
            row |= self._rates(images)
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            for sink in self._sinks:
                sink(step, _numbers(row))
            self._progress.show(step, row)
        elif self._last is None:
            self._rates(images)  # rates are counted from the first step on, which is slow for its own reasons
        self._progress.advance(step)

    def close(self) -> None:
        """Finish the progress line and whatever writes beside `log.jsonl`."""
        if self.is_main:
            for close in self._closers:
                close()

    def _rates(self, images: int) -> dict[str, float | None]:
        """Throughput and share of time spent waiting for data since the last call, which this one becomes."""
        now = time.perf_counter()
        rates: dict[str, float | None] = {"images_per_second": None, "data_wait_share": None}
        if self._last is not None:
            seconds = max(now - self._last[0], 1e-9)
            rates = {
                "images_per_second": (images - self._last[1]) / seconds,
                "data_wait_share": min(self._waited / seconds, 1.0),
            }
        self._last = (now, images)
        self._waited = 0.0
        return rates


class _Progress:
    """A bar on a terminal, and elsewhere one plain line every few seconds."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.total_steps = total_steps
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)
        self._first: tuple[float, int] | None = None  # time and step from which the speed is measured
        self._shown = -math.inf

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if self._first is None:
            self._first = (time.perf_counter(), step)

    def show(self, step: int, row: dict[str, Any]) -> None:
        words = [
            f"{name} {row[name]:.4g}" for name in ("loss", "lr", "grad_norm") if row.get(name) is not None
        ]
        if row["images_per_second"] is not None:
            words.append(f"{row['images_per_second']:.4g} images/s")
            words.append(f"data wait {row['data_wait_share']:.0%}")
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(words), refresh=False)
            return
        now = time.perf_counter()
        if now - self._shown < _SECONDS_BETWEEN_LINES and step < self.total_steps:
            return
        self._shown = now
        if self._first is not None and step > self._first[1]:
            speed = (now - self._first[0]) / (step - self._first[1])
            words.append(f"{_clock(speed * (self.total_steps - step))} left")
        print(f"step {step}/{self.total_steps}: " + ", ".join(words), flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the whole lines of a log up to `step`: what a killed run wrote later is written again."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):  # cut off by a kill
            keep = False
        if keep and line.endswith(b"\n"):
            kept.append(line)
    write_atomic(path, lambda file: file.writelines(kept))


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if callable(value):
        value = value()
    if hasattr(value, "item"):  # scalars of torch and numpy
        value = value.item()
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row, those in inner dictionaries under `outer/inner`."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
