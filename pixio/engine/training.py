"""What training programs share: options (with the release's flag names), start, log, saves and resuming."""

import gc
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from pixio.engine import signals
from pixio.engine.checkpoint import Checkpoints, Interval
from pixio.engine.config import option, save_config
from pixio.engine.lock import lock_folder
from pixio.engine.logger import Log
from pixio.engine.prefetch import Prefetch
from pixio.engine.program import program
from pixio.engine.runtime import Runtime, start_runtime
from pixio.engine.schedule import warmup_cosine
from pixio.engine.signals import defer_signals
from pixio.engine.step import Agreement, NonFiniteLoss
from pixio.files import write_json

GARBAGE_STEPS = 500


@dataclass(frozen=True)
class TrainConfig:
    """Base of the programs' configurations. Steps are optimizer steps; epochs are converted here, once."""

    # data
    dataset_type: Literal["imagenet", "webdataset", "folder", "scenes"] = option(
        "imagenet", "kind of data in --data_path"
    )
    data_path: str = option("", "folder with tars or images; not used for scenes")
    image_suffix: str | None = option(
        None, "read only files whose names end in this, such as .jpg; by default all images"
    )
    json_path: str | None = option(None, "folder with the curation statistics of web tars")
    soft_sampling: bool = option(False, "keep an image with probability min(mae_loss, 1) at each visit")
    hist_thresh: float | None = option(None, "drop images with a histogram_score of at most this", ge=0)
    imgres_thresh: int | None = option(None, "drop images with a side below this, in pixels", ge=0)
    input_size: int = option(256, "crop size in pixels, which becomes the native size of the model", ge=1)
    crop_scale_min: float = option(
        0.2, "smallest area of a random crop, as a fraction of the image", gt=0, le=1
    )
    decode: Literal["fast", "exact"] = option(
        "fast", "fast: decode only what a crop needs; exact: whole images at full resolution, with Pillow"
    )
    num_workers: int = option(6, "data-loading processes per rank", ge=0)
    pin_mem: bool = option(True, "use pinned memory for faster transfers to the GPU")
    # optimization
    batch_size: int = option(64, "images per rank and forward pass", ge=1)
    accum_iter: int = option(1, "forward passes per step", ge=1)
    epochs: int = option(400, "length of the run, in epochs of --iters_per_epoch steps", ge=1)
    iters_per_epoch: int = option(1605, "steps per epoch", aliases=("iter_per_epoch",), ge=1)
    warmup_epochs: int = option(40, "epochs of linear warm-up from 0", ge=0)
    lr: float | None = option(None, "peak learning rate; by default blr x images per step / 256", gt=0)
    blr: float = option(2.5e-5, "base learning rate: the peak for 256 images per step", gt=0)
    min_lr: float = option(0.0, "learning rate at the end", ge=0)
    weight_decay: float = option(0.05, "AdamW decay of weights, not of biases and norms", ge=0)
    clip_grad: float | None = option(
        None, "clip the gradient norm to this; not used in the published recipes", gt=0
    )
    position_init: Literal["normal", "sincos"] = option(
        "normal",
        "initial position embeddings; normal: small noise, as published; sincos: MAE's, for short runs",
    )
    seed: int = option(0, "random seed of weights, sample order, crops and masks", ge=0)
    # run
    output_dir: str = option("runs/latest", "folder for everything the run writes")
    log_dir: str | None = option(None, "folder for log.jsonl and TensorBoard; by default --output_dir")
    log_freq: int = option(20, "steps between log lines", ge=1)
    save_freq: int = option(
        20, "epochs between checkpoints that are never deleted; 0 = keep only the newest two", ge=0
    )
    save_steps: int = option(0, "steps between checkpoints; 0 = off", ge=0)
    save_minutes: float = option(30.0, "minutes between checkpoints; 0 = off", ge=0)
    resume: str | None = option(
        None, "checkpoint of another run to start from; the run's own is found automatically"
    )
    new_data: bool = option(
        False,
        "resume on different data: keep weights and optimizer, start a new epoch of the data",
    )
    start_epoch: int = option(0, "first epoch of a run that has no checkpoint", ge=0)
    tensorboard: bool = option(False, "also log to TensorBoard")
    wandb: bool = option(False, "also log to Weights & Biases")
    # hardware
    device: str = option("auto", "auto (a GPU if there is one), cpu, or the name of a torch device")
    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", "autocast dtype")
    compile: bool | None = option(None, "compile the blocks with torch.compile; by default on GPUs only")
    parallel: Literal["ddp", "fsdp", "hybrid"] = option(
        "ddp", "ddp: a full copy on each GPU; fsdp: sharded over all GPUs; hybrid: sharded within each node"
    )
    deterministic: bool = option(False, "bitwise reproducible results on GPUs too, with slower kernels")
    grad_checkpointing: bool = option(False, "activation checkpointing: much less memory, a third more time")
    world_size: int | None = option(None, "number of processes, if started by hand; launchers set it", ge=1)
    local_rank: int | None = option(
        None, "index of this process, if started by hand", aliases=("local-rank",), ge=0
    )
    dist_url: str | None = option(
        None, "rendezvous address, if started by hand, such as tcp://127.0.0.1:29500"
    )

    def __post_init__(self) -> None:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"--warmup_epochs {self.warmup_epochs} is longer than the run of {self.epochs} epochs: lower "
                "it, or raise --epochs"
            )

    @property
    def total_steps(self) -> int:
        """Length of the run."""
        return self.epochs * self.iters_per_epoch

    @property
    def start_step(self) -> int:
        """First step of a run without a checkpoint."""
        return self.start_epoch * self.iters_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Length of the warm-up."""
        return self.warmup_epochs * self.iters_per_epoch

    @property
    def keep_every(self) -> int:
        """Steps between checkpoints that are kept for good; 0 = none."""
        return self.save_freq * self.iters_per_epoch

    def images_per_step(self, world_size: int) -> int:
        """Images of all ranks and forward passes of one step."""
        return self.batch_size * self.accum_iter * world_size

    def peak_lr(self, world_size: int) -> float:
        """--lr, or --blr scaled linearly with the images of a step (Goyal et al., arXiv 1706.02677)."""
        return self.lr if self.lr is not None else self.blr * self.images_per_step(world_size) / 256

    def lr_at(self, step: int, peak_lr: float) -> float:
        """Learning rate of a step: a linear rise to the peak, then half a cosine down to --min_lr."""
        return warmup_cosine(step, peak_lr, self.min_lr, self.warmup_steps, self.total_steps)

    def stream_options(self) -> dict[str, Any]:
        """Arguments of `pixio.data.open_stream`."""
        data = ("dataset_type", "data_path", "image_suffix", "batch_size", "seed", "decode")
        curation = ("json_path", "soft_sampling", "hist_thresh", "imgres_thresh")
        options = {name: getattr(self, name) for name in data + curation}
        return options | {"size": self.input_size, "crop_scale": (self.crop_scale_min, 1.0)}

    def loader_options(self, runtime: Runtime) -> dict[str, Any]:
        """Arguments of `pixio.data.Loader`, beside its stream and its state."""
        return {
            "rank": runtime.rank,
            "world_size": runtime.world_size,
            "num_workers": self.num_workers,
            "pin_memory": self.pin_mem and runtime.pins_memory,
            "new_epoch_if_changed": self.new_data,
        }


Config = TypeVar("Config", bound=TrainConfig)


def run_program(
    prog: str,
    config: Config,
    body: Callable[[Config, Runtime], None],
    failures: tuple[type[Exception], ...] = (),
) -> None:
    """Join the ranks a configuration asks for, run `body(config, runtime)`, and leave.

    A user's mistake or a failure ends the program with one line and exit status 1.

    Args:
        prog: name of the program in messages.
        config: the program's configuration.
        body: the training itself.
        failures: exceptions, beside the engine's own, whose message is all a user needs.
    """
    with program(prog, "train", (NonFiniteLoss, *failures)), defer_signals():
        launcher = (config.world_size, config.local_rank, config.dist_url)
        runtime = start_runtime(
            config.device, config.dtype, *launcher, config.parallel, deterministic=config.deterministic
        )
        gc.freeze()  # what is there stays
        gc.disable()  # see `collect_garbage`
        try:
            with lock_folder(config.output_dir, runtime):
                body(config, runtime)
        finally:
            gc.enable()
            gc.unfreeze()
            runtime.close()


def collect_garbage(step: int) -> None:
    """Collect garbage every GARBAGE_STEPS steps, on all ranks at once: each waits for the slowest anyway."""
    if step % GARBAGE_STEPS == 0:
        gc.collect()


def start_log(config: TrainConfig, runtime: Runtime, start_step: int) -> Log:
    """Collective: open the run's log and write the resolved configuration beside its results.

    Raises:
        ValueError: on every rank, when a file cannot be made or a library for the log is not installed.
    """

    def start() -> Log:
        if runtime.is_main:
            output = Path(config.output_dir)
            output.mkdir(parents=True, exist_ok=True)
            save_config(config, output / "config.json")
        return Log(
            config.log_dir or config.output_dir,
            config.total_steps,
            runtime.is_main,
            start_step=start_step,
            every=config.log_freq,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            config=asdict(config),
        )

    return runtime.agree(start)


def save_run(
    config: TrainConfig,
    runtime: Runtime,
    checkpoints: Checkpoints,
    step: int,
    images: int,
    batches: Prefetch,
    models: dict[str, Any],
    exports: Mapping[str | os.PathLike, Callable[[dict[str, Any]], Any]],
    wait: bool,
) -> None:
    """Collective: save `models` with all else a run needs to resume, and what its loaders have read.

    The latter, with damaged files by name, goes to `data_report.json`.

    Args:
        config: options of the run, saved too.
        runtime: the ranks of the run.
        checkpoints: where to save.
        step: optimizer steps taken.
        images: images seen in these steps, over all ranks.
        batches: of this rank.
        models, exports, wait: see `Checkpoints.save`.
    """
    data, reports = zip(*runtime.gather((batches.state_dict(step), batches.report())), strict=True)
    state = {**models, "data": list(data), "images": images, "config": asdict(config)}
    checkpoints.save(step, state, exports, wait)
    if runtime.is_main:
        try:
            write_json(Path(config.output_dir) / "data_report.json", list(reports))
        except OSError as error:
            print(f"training continues without data_report.json: {error}", file=sys.stderr, flush=True)


def save_when_due(
    config: TrainConfig,
    runtime: Runtime,
    agreement: Agreement,
    interval: Interval,
    step: int,
    save: Callable[..., None],
) -> bool:
    """Collective: call `save(step, wait=…)` when it is time to; returns whether the run was asked to stop.

    It is time when `interval` is due, every --save_freq epochs, at the end of the run, and before it stops;
    these last two saves are waited for. After its last step a run ends instead of stopping.

    Raises:
        NonFiniteLoss: in place of a save, when the newest step was not finite.
    """
    last = step == config.total_steps
    stopping = agreement.stop and not last
    kept = config.keep_every > 0 and step % config.keep_every == 0
    if interval.due(step, agreement.late) or stopping or last or kept:
        agreement.settle()
        save(step, wait=stopping or last)
    if stopping:
        say_stopped(runtime, step, config.total_steps)
    return stopping


def say_stopped(runtime: Runtime, step: int, total_steps: int) -> None:
    """Rank 0 says by what a run was stopped, and that its state after `step` is saved."""
    if runtime.is_main:
        why = signals.names() or "a signal to another rank"
        print(f"stopped by {why}: saved after step {step} of {total_steps}; the same command resumes")


def is_finished(config: TrainConfig, runtime: Runtime, step: int) -> bool:
    """Whether a run has no step left after `step`; says so."""
    finished = step >= config.total_steps
    if finished and runtime.is_main:
        print(
            f"{Path(config.output_dir).absolute()} is finished: {step} of {config.total_steps} steps are done"
        )
    return finished


def state_to_resume(
    config: TrainConfig, checkpoints: Checkpoints, keys: tuple[str, ...]
) -> dict[str, Any] | None:
    """Collective: the run's newest checkpoint, else that of --resume, else None.

    Raises:
        ValueError: it cannot be read, is of another program, or differs from `config` in one of `keys`.
    """
    state, flag, path = checkpoints.load_latest(), "--output_dir", config.output_dir
    if state is None and config.resume:
        flag, path = "--resume", config.resume
        if Path(path).is_file():
            init = [f"--{option.name}" for option in fields(config) if option.name.startswith("init_")]
            raise ValueError(
                f"{Path(path).absolute()} is a file, --resume takes a folder checkpoints/step_… of a run"
                + (f"; to start a new run from its weights use {' or '.join(init)}" if init else "")
            )
        state = checkpoints.load(path)
    saved = (state.get("config") or {}) if state else {}
    for key in keys if state else ():
        if key not in saved:
            found = f"another kind of run, without {key}"
        elif saved[key] != getattr(config, key):
            found = f"a run with {key} {saved[key]}, not {getattr(config, key)}"
        else:
            continue
        raise ValueError(f"{Path(path).absolute()} is of {found}: choose another {flag}")
    return state
