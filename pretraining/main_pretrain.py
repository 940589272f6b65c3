"""Pre-train a Pixio: mask blocks of an image, reconstruct their pixels (paper, section 3; hyper-parameters
appendix).

    python main_pretrain.py --model pixio_vits16_enc384x12h6_dec256x4h8 --data_path DIR --output_dir runs/s16
    torchrun --nproc_per_node 8 main_pretrain.py …

The same command resumes a run that was stopped. `--output_dir` receives `log.jsonl`, `config.json`,
`data_report.json` (damaged files by name), `checkpoints/` and `encoder.pth`, the encoder alone under the
released keys. Descends from MAE's main_pretrain.py (https://github.com/facebookresearch/mae).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from held_out import HeldOut
from torch import Tensor, nn

import pixio
from pixio.data import DataError, Loader, open_stream
from pixio.engine.checkpoint import Checkpoints, Interval, restore
from pixio.engine.config import option, parse
from pixio.engine.optim import make_adamw, set_lr
from pixio.engine.prefetch import Prefetch
from pixio.engine.runtime import Runtime
from pixio.engine.signals import Preempted
from pixio.engine.step import Agreement, NonFiniteLoss, accumulate
from pixio.engine.training import (
    TrainConfig,
    collect_garbage,
    is_finished,
    run_program,
    save_run,
    save_when_due,
    start_log,
    state_to_resume,
)
from pixio.images.normalization import normalize
from pixio.models.health import HealthWatch
from pixio.models.registry import initialize_from


# ---------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Pre-train a Pixio by reconstructing masked blocks of pixels."""

    model: str = option("pixio_vith16_enc1280x32h16_dec512x32h16", "pre-training model, see `pixio info`")
    n_cls_tokens: int = option(8, "class tokens", ge=1)
    mask_ratio: float = option(0.75, "share of masked cells", gt=0, lt=1)
    mask_grid: int = option(4, "side of a masked cell in patches", ge=1)
    norm_pix_loss: bool = option(True, "predict pixels normalized by the mean and variance of their patch")
    drop_path: float = option(0.0, "stochastic depth rate of the last encoder block", ge=0, lt=1)
    drop_path_mode: Literal["exact", "skip"] = option(
        "exact",
        "exact: drop branches of each image at random; skip: compute them for a fixed number of images only",
    )
    init_encoder: str | None = option(None, "encoder weights to start from; the decoder is newly initialized")
    init_mae: str | None = option(
        None, "training checkpoint, of this code or the release, whose encoder and decoder to start from"
    )
    freeze_encoder_steps: int = option(0, "train only the decoder for this many steps first", ge=0)
    val_data: str | None = option(None, "folder of held-out images (256 at most), whose loss is also logged")
    val_freq: int = option(500, "steps between evaluations of --val_data; also after the last step", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in (models := pixio.list_models(pretraining=True)):
            raise ValueError(
                f"--model {self.model} is not a pre-training model; choose one of {', '.join(models)}"
            )
        if self.init_encoder and self.init_mae:
            raise ValueError("--init_mae starts from encoder and decoder: leave --init_encoder out")


# ---------------------------------------------------------------------------------------------- the run
def first_model(config: PretrainConfig) -> pixio.PixioMAE:
    """The model as it starts: random, or with the weights of --init_encoder or --init_mae.

    Raises:
        OSError, ValueError: see `pixio.models.registry.initialize_from`.
    """
    mae = pixio.create_model(
        config.model,
        img_size=config.input_size,
        n_cls_tokens=config.n_cls_tokens,
        drop_path=config.drop_path,
        drop_path_mode=config.drop_path_mode,
        mask_grid=config.mask_grid,
        norm_pix_loss=config.norm_pix_loss,
    )
    if config.position_init == "sincos":
        mae.start_from_sincos()
    source, decoder = config.init_mae or config.init_encoder, config.init_mae is not None
    if source and (resized := initialize_from(mae, source, decoder)):
        print(resized, flush=True)
    return mae


def pretrain(config: PretrainConfig, runtime: Runtime) -> None:
    """Train until the last step; saves on the way, and before it raises `NonFiniteLoss` or `Preempted`."""
    output = Path(config.output_dir)
    base_lr = config.peak_lr(runtime.world_size)

    # ---- model, optimizer
    runtime.seed(config.seed, step=0)
    mae = runtime.build(lambda: first_model(config))
    model = runtime.wrap(mae, config.grad_checkpointing, config.compile)
    optimizer = make_adamw(mae, base_lr, weight_decay=config.weight_decay, parts=("encoder",))
    scaler = runtime.make_scaler()

    # ---- resume
    checkpoints = Checkpoints(output / "checkpoints", runtime, keep_newest=2, keep_every=config.keep_every)
    state = state_to_resume(config, checkpoints, ("model", "input_size", "n_cls_tokens"))
    start, seen = config.start_step, 0
    if state:
        start, seen = state["step"], state["images"]
        restore(mae, optimizer, state, scaler)
    if is_finished(config, runtime, start):
        return

    # ---- data
    stream = open_stream(**config.stream_options())
    if runtime.is_main:
        print(stream.describe())
    loader = Loader(stream, **config.loader_options(runtime), state=state["data"] if state else None)

    held_out = HeldOut(config.val_data, mae, config.mask_ratio) if config.val_data else None

    # ---- loop
    def images_after(step: int) -> int:
        return seen + (step - start) * config.images_per_step(runtime.world_size)

    def save(step: int, wait: bool = True) -> None:
        models = {
            "model": mae.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        exports = {output / "encoder.pth": encoder_of}
        images = images_after(step)
        save_run(config, runtime, checkpoints, step, images, batches, models, exports, wait)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output = model(normalize(batch["images"]), config.mask_ratio)
        health.keep(output.tokens)
        return output.loss

    log, health = start_log(config, runtime, start), HealthWatch()
    interval = Interval(config.save_steps, config.save_minutes)
    agreement = Agreement(runtime, start, lambda: interval.late() or checkpoints.failed())
    batches = Prefetch(loader, runtime, config.accum_iter, range(start, config.total_steps))
    model.train()
    try:
        for step in range(start, config.total_steps):
            waiting = time.perf_counter()
            micro_batches = next(batches)
            waiting = time.perf_counter() - waiting
            lr = config.lr_at(step, base_lr)
            set_lr(optimizer, lr, frozen="encoder" if step < config.freeze_encoder_steps else None)
            runtime.seed(config.seed, step)  # masks and stochastic depth
            result = accumulate(
                runtime, model, optimizer, scaler, micro_batches, loss_fn, config.clip_grad, agreement
            )
            done = step + 1
            validate = held_out and (done % config.val_freq == 0 or done == config.total_steps)
            held_out_loss = {"held_out_loss": held_out.loss(runtime, model)} if validate else {}
            log.step(
                done,
                images_after(done),
                waiting,
                always=bool(validate),
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                health=health.measure,
                **held_out_loss,
                memory=runtime.memory,
                data=batches.counts,
            )
            collect_garbage(done)
            if save_when_due(config, runtime, agreement, interval, done, save):
                log.close()
                raise Preempted
    except NonFiniteLoss as error:  # known a step later; the weights are those before it
        save(error.step)
        raise
    finally:
        batches.close()
    log.close()


def encoder_of(state: dict) -> dict[str, Tensor]:
    """The encoder of a checkpoint under the released keys."""
    names = [name for name in state["model"] if name.startswith("encoder.")]
    return {name.removeprefix("encoder."): state["model"][name] for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, start, train; a mistake or a failure ends the program with one line."""
    config = parse(PretrainConfig, argv, prog="main_pretrain.py")
    run_program("main_pretrain.py", config, pretrain, failures=(DataError,))


if __name__ == "__main__":
    main()
