"""The training of what an evaluation trains: resumed where it was stopped, evaluated on the way, saved."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from launch import EvaluationConfig
from torch import Tensor, nn

from pixio.engine.checkpoint import Checkpoints, Interval, restore
from pixio.engine.config import option
from pixio.engine.logger import Log
from pixio.engine.optim import set_lr
from pixio.engine.runtime import Runtime
from pixio.engine.signals import Preempted
from pixio.engine.step import Agreement, NonFiniteLoss, accumulate
from pixio.engine.training import say_stopped

# Settings that change where and how fast a run goes, but not its metrics; others must be equal to resume it.
RESUME_IGNORES = (
    *("config", "encoder", "model", "pretrained_ckp", "data_root", "data_path", "output_dir", "expect_count"),
    *("device", "port", "local_rank", "num_workers", "window_batch", "eval_freq", "panels", "save_minutes"),
    *("log_freq", "deterministic"),
)
# Options that older runs lack, and what they would have been.
_SINCE = {
    "apply_exif": "False",
    "train_blocks": "0",
    "encoder_lr": "None",
    "layer_decay": "0.75",
    "drop_path": "0.0",
    "dpt_width": "256",
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(EvaluationConfig):
    """Settings of all evaluations that train something; the encoder stays frozen unless asked for."""

    epochs: int = option(60, "passes over the training images", ge=1)
    batch_size: int = option(
        4, "crops that share one loss: the batch of one GPU in the published recipes", ge=1
    )
    batches_per_step: int = option(
        8,
        "batches per optimizer step, divided among the ranks (in the recipes: one on each of 8 GPUs)",
        ge=1,
    )
    lr: float = option(1e-4, "peak learning rate, for any number of ranks", gt=0)
    weight_decay: float = option(0.01, "AdamW decay", ge=0)
    seed: int = option(0, "random seed of initial weights, image order and crops", ge=0)
    num_workers: int = option(4, "data-loading processes per rank", ge=0)
    # fine-tuning
    train_blocks: str = option(
        "0", "number of last encoder blocks to train as well, or all; 0 = frozen encoder"
    )
    encoder_lr: float | None = option(
        None, "peak learning rate of the trained blocks; by default a tenth of --lr", gt=0
    )
    layer_decay: float = option(
        0.75, "factor on the learning rate from each block to the one before it", gt=0
    )
    drop_path: float = option(
        0.0, "stochastic depth rate of the last encoder block, if it is trained", ge=0, lt=1
    )
    # run
    eval_freq: int = option(1, "epochs between evaluations; also after the last epoch", ge=1)
    save_minutes: float = option(
        10.0, "minutes between checkpoints within an epoch; 0 = only at its end", ge=0
    )
    log_freq: int = option(20, "steps between log lines", ge=1)

    def __post_init__(self) -> None:
        if self.train_blocks != "all" and not self.train_blocks.isdecimal():
            raise ValueError(f"--train_blocks must be a number of blocks or all, found {self.train_blocks}")

    @property
    def tunes(self) -> bool:
        """Whether some of the encoder learns."""
        return self.train_blocks == "all" or int(self.train_blocks) > 0

    @property
    def peak_encoder_lr(self) -> float:
        """Peak learning rate of the trained blocks."""
        return self.encoder_lr or self.lr / 10

    @property
    def blocks_to_train(self) -> int | None:
        """Number of the last blocks that learn; None = all, with the embeddings."""
        return None if self.train_blocks == "all" else int(self.train_blocks)


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and how it is evaluated.

    Attributes:
        module: what learns, on the device; its state is saved.
        optimizer: over its parameters.
        steps_per_epoch, per_step: steps of an epoch, examples of a step over all ranks.
        batches: first step, step to end before -> the rank's batches, which have `names`.
        loss: wrapped module, batch -> scalar; runs under autocast.
        lr: step -> learning rate.
        evaluate: () -> metrics; raises `Preempted` when asked to stop.
        publish: all rows so far -> writes the results.
        setting: what a run must have in common with one that it resumes.
    """

    config: TrainingConfig
    runtime: Runtime
    output: Path
    module: nn.Module
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    per_step: int
    batches: Callable[[int, int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    lr: Callable[[int], float]
    evaluate: Callable[[], dict[str, Any]]
    publish: Callable[[list[dict[str, Any]]], Any]
    setting: dict[str, Any]


def train(run: Training) -> list[dict[str, Any]]:
    """Train to the end, evaluating on the way; resumes where an earlier run stopped.

    Asked to stop, it saves and raises `Preempted`, after a step or between two images of an evaluation, which
    the run that resumes then makes from its beginning.

    Returns:
        The metrics of every evaluation, with their `epoch`.

    Raises:
        ValueError: the folder holds another run, or the loss is not finite.
    """
    config, runtime, module, optimizer = run.config, run.runtime, run.module, run.optimizer
    total = config.epochs * run.steps_per_epoch
    model = runtime.wrap(module)
    scaler = runtime.make_scaler()

    # ---- resume
    checkpoints = Checkpoints(run.output / "checkpoints", runtime, keep_newest=1)
    setting = {key: str(value) for key, value in run.setting.items() if key not in RESUME_IGNORES}
    start, rows, seconds = 0, [], 0.0
    if state := checkpoints.load_latest():
        what = f"{run.output} holds a run with"
        saved = {key: value for key, value in _SINCE.items() if key in setting} | state.get("setting", {})
        check_same(saved, setting, what, "choose another --output_dir")
        start, rows, seconds = state["step"], state["rows"], state["seconds"]
        restore(module, optimizer, state, scaler)
    began = time.monotonic() - seconds

    def save(step: int) -> None:
        checkpoints.save(
            step,
            {
                "model": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "rows": rows,
                "seconds": time.monotonic() - began,
                "setting": setting,
            },
        )

    def evaluate_if_due(step: int) -> bool:
        """Evaluate after the last step of an epoch that asks for it, unless this has been done."""
        epoch, within = divmod(step, run.steps_per_epoch)
        asked = epoch > 0 and within == 0 and (epoch % config.eval_freq == 0 or epoch == config.epochs)
        if not asked or epoch in (row["epoch"] for row in rows):
            return False
        rows.append({"epoch": epoch, "seconds": time.monotonic() - began, **run.evaluate()})
        if step < total:  # the last are published once the checkpoint is written
            run.publish(rows)
        return True

    if evaluate_if_due(start):  # what an earlier run was stopped in
        save(start)

    # ---- loop
    log = Log(run.output, total, runtime.is_main, start_step=start, every=config.log_freq)
    interval = Interval(minutes=config.save_minutes)
    agreement = Agreement(runtime, start, interval.late)
    batches = run.batches(start, total)
    names: dict[int, Sequence[str]] = {}  # of what the last two steps have read
    module.train()
    for step in range(start, total):
        waiting = time.perf_counter()
        batch = next(batches)
        waiting = time.perf_counter() - waiting
        names = {step - 1: names.get(step - 1, ()), step: batch.names}
        lr = run.lr(step)
        set_lr(optimizer, lr)
        if config.tunes:
            runtime.seed(config.seed, step)  # stochastic depth
        done = step + 1
        try:
            result = accumulate(runtime, model, optimizer, scaler, [batch], run.loss, None, agreement)
            due = interval.due(done, agreement.late) or done % run.steps_per_epoch == 0
            if due or agreement.stop:
                agreement.settle()
        except NonFiniteLoss as error:
            read = ", ".join(names[error.step])
            raise ValueError(f"{error}. Rank {runtime.rank} had read {read}") from error
        metrics = {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm, "memory": runtime.memory}
        log.step(done, done * run.per_step, waiting, **metrics)
        try:
            if agreement.stop:
                raise Preempted
            evaluate_if_due(done)
        except Preempted:
            save(done)
            say_stopped(runtime, done, total)
            log.close()
            raise
        if due:
            save(done)
    log.close()
    return rows


def check_shares(config: TrainingConfig, runtime: Runtime) -> None:
    """Raise ValueError where the ranks cannot share a step."""
    if config.batches_per_step % runtime.world_size:
        raise ValueError(
            f"{config.batches_per_step} batches per step cannot be shared by {runtime.world_size} ranks: "
            "start a number of ranks that divides it, or change --batches_per_step"
        )


def check_same(found: dict[str, Any], expected: dict[str, Any], what: str, remedy: str) -> None:
    """Refuse a file that was made with other settings: "WHAT key found, not expected: REMEDY"."""
    other = [
        f"{key} {found.get(key)}, not {expected.get(key)}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    if other:
        raise ValueError(f"{what} {'; '.join(other[:4])}: {remedy}")


def setting_of(config: TrainingConfig, **facts: Any) -> dict[str, Any]:
    """What a run must have in common with one that it resumes: its options, and facts about it."""
    return asdict(config) | facts
