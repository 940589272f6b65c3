"""What a run reports: `log.jsonl` and progress always, TensorBoard and Weights & Biases when asked for."""

import contextlib
import errno
import importlib.util
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixio.files import disk_full, finite, write_atomic, write_text

_SHOWN = ("loss", "held_out_loss", "lr", "grad_norm")  # by the progress line
_SECONDS_BETWEEN_LINES = 10.0  # where the output is a file, a line per logged step would bury everything else


class Log:
    """Records a run step by step; only rank 0 writes, and device scalars are read on logged steps only.

    Logged are the first step of the run, every `every`-th and the last. A line of `log.jsonl` is an object
    with `step`, `images`, the values given, and `images_per_second` and `data_wait_share` since the line
    before (null on the first after a start). Numbers that are not finite become null, as JSON asks. What
    cannot be started or written (no login, a full disk) is reported once and never ends training.

    Args:
        folder: where `log.jsonl` is; made when missing.
        total_steps: steps of the whole run.
        is_main: whether this rank writes.
        start_step: steps taken when the run was resumed; lines beyond it are dropped.
        every: steps between logged steps.
        tensorboard: also write TensorBoard events into `folder`.
        wandb: also report to Weights & Biases, which reads its own environment variables. A resumed run stays
            one run there: its id is kept in `folder`.
        config: options of the run, for Weights & Biases.

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
            raise ValueError(f"every must be at least 1 step, found {every}")
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
        begin = f"resumed after step {start_step} of {total_steps}" if start_step else f"{total_steps} steps"
        print(f"{begin}, in {folder.absolute()}; Ctrl-C saves, the same command resumes", flush=True)
        self._lines = _Lines(folder / "log.jsonl", start_step)
        self._progress = _Progress(total_steps, start_step)
        self._sinks: dict[str, Callable[[int, dict[str, Any]], object]] = {
            str(self._lines.path.absolute()): self._lines.write,
            "progress": self._progress.show,
        }
        self._closers = [self._lines.close, self._progress.close]
        self._failing: set[str] = set()
        if tensorboard:
            self._try("TensorBoard", self._start_tensorboard, folder, start_step)
        if wandb:
            self._try("Weights & Biases", self._start_wandb, folder, config)
        self._last: tuple[float, int] | None = None  # time and images seen at the line before
        self._waited = 0.0

    def step(
        self, step: int, images: int, data_wait: float = 0.0, always: bool = False, **values: Any
    ) -> None:
        """Report that `step` steps have been taken.

        Args:
            step: optimizer steps so far; the first call of a run says 1.
            images: images seen so far, over all ranks.
            data_wait: seconds this step waited for its data.
            always: log this step whatever its number.
            values: what else to log, by name: numbers, scalar tensors, text, dictionaries of these, or
                functions without arguments that give one, called on logged steps only.
        """
        if not self.is_main:
            return
        self._waited += data_wait
        if always or step == 1 or step % self.every == 0 or step == self.total_steps:
            row = {"step": step, "images": images} | {name: _plain(value) for name, value in values.items()}
            row |= self._rates(images)
            for name, write in self._sinks.items():
                self._try(name, write, step, row)
        elif self._last is None:
            self._rates(images)  # rates are counted from the first step on, which is slow for its own reasons
        self._try("progress", self._progress.advance, step)

    def _start_tensorboard(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=start_step + 1)
        self._sinks["TensorBoard"] = lambda step, row: [
            writer.add_scalar(name, value, step) for name, value in _numbers(row).items()
        ]
        self._closers.append(writer.close)

    def _start_wandb(self, folder: Path, config: dict[str, Any] | None) -> None:
        """Start a run of Weights & Biases, or continue the one whose id is in `folder`."""
        import wandb

        file = folder / "wandb_id"
        if not file.exists():
            write_text(file, f"{uuid.uuid4().hex[:8]}\n")
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pixio"),
            id=os.environ.get("WANDB_RUN_ID") or file.read_text().strip(),
            resume="allow",
            dir=str(folder),
            name=folder.resolve().name,
            config=config,
        )
        self._sinks["Weights & Biases"] = lambda step, row: run.log(_numbers(row), step=step)
        self._closers.append(run.finish)

    def close(self) -> None:
        """Finish the progress line and whatever writes beside `log.jsonl`."""
        if self.is_main:
            for close in self._closers:
                self._try("the log", close)

    def _try(self, name: str, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function whose failure must not end training; says so once, until it works again."""
        try:
            function(*arguments)
            self._failing.discard(name)
        except Exception as error:  # whatever a service or a disk can raise
            if name not in self._failing:
                self._failing.add(name)
                with contextlib.suppress(OSError):  # where nobody reads any more
                    reason = " ".join(str(error).split()) or type(error).__name__
                    print(
                        f"{name} cannot be written, training continues: {reason}", file=sys.stderr, flush=True
                    )

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
        numbers = _numbers(row)
        words = [f"{name} {numbers[name]:.4g}" for name in _SHOWN if name in numbers]
        for name, value in numbers.items():  # of models that learn side by side, the terms of their losses
            if name.endswith(("/loss_cls", "/loss_patch")):
                words.append(f"{name.partition('/')[2]} {value:.4g}")
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


class _Lines:
    """A file of JSON lines in which every line is whole."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Keep the whole lines up to `last_step`: what a killed run wrote later is written again."""
        self.path = path
        if path.exists():
            kept = []
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    keep = json.loads(line)["step"] <= last_step
                except (ValueError, KeyError, TypeError, RecursionError):  # cut off by a kill, or damaged
                    keep = False
                if keep and line.endswith(b"\n"):
                    kept.append(line)
            write_atomic(path, lambda file: file.writelines(kept))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self.close = self._file.close

    def write(self, _: int, row: dict[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        begin = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(begin)
            raise disk_full(error, self.path, len(line)) or error from None


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if callable(value):
        value = value()
    if hasattr(value, "item"):  # scalars of torch and numpy
        value = value.item()
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return finite(value)


def _numbers(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row, those in inner dictionaries under `outer/inner`."""
    found: dict[str, float] = {}
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
