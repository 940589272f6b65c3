"""Distill a frozen teacher into smaller encoders: one teacher forward pass per batch, each student in turn
(paper, distillation).

    python main_distill.py --teacher_model pixio_vitl16 --teacher_pretrained pixio_vitl16.pth \\
        --student_models pixio_vits16 pixio_vitti16 --data_path DIR --output_dir runs/s16
    torchrun --nproc_per_node 8 main_distill.py …

The same command resumes a run that was stopped. `--output_dir` receives `log.jsonl`, `config.json`,
`data_report.json` (damaged files by name), `checkpoints/` with all students together, and for each student
`encoder_NAME.pth`, under the released keys, and `projector_NAME.pth`.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from distill_config import DistillConfig
from feature_cache import CachedBatches, open_cache
from students import Batch, exports_of, make_trainer, student_metrics
from teachers import load_teacher, teacher_tokens
from token_losses import Tokens
from torch import Tensor

import pixio
from pixio.data import DataError, Loader, open_stream
from pixio.engine.checkpoint import Checkpoints, Interval
from pixio.engine.config import parse
from pixio.engine.optim import set_lr
from pixio.engine.prefetch import Prefetch
from pixio.engine.runtime import Runtime
from pixio.engine.signals import Preempted
from pixio.engine.step import Agreement, NonFiniteLoss, apply_gradients, compute_gradients
from pixio.engine.training import (
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


def distill(config: DistillConfig, runtime: Runtime) -> None:
    """Train until the last step; saves on the way, and before it raises `NonFiniteLoss` or `Preempted`."""
    output = Path(config.output_dir)

    # ---- the newest checkpoint
    checkpoints = Checkpoints(output / "checkpoints", runtime, keep_newest=2, keep_every=config.keep_every)
    fixed = ("student_models", "teacher_model", "input_size", "n_cls_tokens", "feature_cache")
    state = state_to_resume(config, checkpoints, fixed)
    start, seen = config.start_step, 0
    if state:
        start, seen = state["step"], state["images"]
    if is_finished(config, runtime, start):
        return

    # ---- teacher, students
    source, expected = config.teacher_pretrained, state.get("teacher") if state else None
    teacher = runtime.build(
        lambda: load_teacher(config.teacher_model, source, runtime.device, runtime.dtype, expected),
        whole=bool(config.feature_cache),  # which every rank fills with a whole one
    )
    if not config.feature_cache:
        ours = isinstance(teacher, pixio.PixioViT)  # other libraries' blocks may not be one graph
        teacher = runtime.wrap(teacher, compile=config.compile if ours else False)
    trainers = [make_trainer(config, runtime, teacher, i) for i in range(len(config.student_models))]
    for trainer in trainers if state else ():
        trainer.load_state_dict(state["students"][trainer.name])

    # ---- data, teacher tokens
    stream, grid = open_stream(**config.stream_options()), trainers[0].objective.grid
    if runtime.is_main:
        print(stream.describe())
    if config.feature_cache:
        folder = Path(config.feature_cache)
        cache = open_cache(folder, stream, teacher, grid, runtime, config.num_workers)
        pinned = config.pin_mem and runtime.pins_memory
        loader = CachedBatches(cache, stream, runtime.rank, runtime.world_size, seen, pinned)
    else:
        position = state["data"] if state else None
        loader = Loader(stream, **config.loader_options(runtime), state=position)
    health = HealthWatch("the teacher", "Students have little to learn from it: choose another")

    def prepare(batch: dict[str, Tensor]) -> Batch:
        """What all students share: pixels, the teacher's tokens, and one mask if they are to share it."""
        pixels, noise = normalize(batch["images"]), None
        if config.feature_cache:
            targets = Tokens.split(batch["tokens"].float(), teacher.n_cls_tokens)
        else:
            with runtime.autocast():
                targets = teacher_tokens(teacher, pixels, grid)
        health.keep(targets.patch)
        if config.share_masks:
            noise = torch.rand(len(pixels), trainers[0].objective.n_cells, device=pixels.device)
        return Batch(pixels, targets, noise)

    # ---- loop
    def images_after(step: int) -> int:
        return seen + (step - start) * config.images_per_step(runtime.world_size)

    def save(step: int, wait: bool = True) -> None:
        models = {
            "students": {trainer.name: trainer.state_dict() for trainer in trainers},
            "teacher": teacher.fingerprint,
        }
        exports = exports_of(config.student_models, output)
        images = images_after(step)
        save_run(config, runtime, checkpoints, step, images, batches, models, exports, wait)

    log = start_log(config, runtime, start)
    interval = Interval(config.save_steps, config.save_minutes)
    agreement = Agreement(runtime, start, lambda: interval.late() or checkpoints.failed())
    batches = Prefetch(loader, runtime, config.accum_iter, range(start, config.total_steps))
    try:
        for step in range(start, config.total_steps):
            waiting = time.perf_counter()
            raw = next(batches)
            waiting = time.perf_counter() - waiting
            runtime.seed(config.seed, step)  # shared masks
            micro_batches = [prepare(batch) for batch in raw]
            gradients, rates = {}, {}
            for trainer in trainers:
                name, optimizer, scaler = trainer.name, trainer.optimizer, trainer.scaler
                rates[name] = config.lr_at(step, trainer.peak_lr)
                set_lr(optimizer, rates[name])
                runtime.seed(config.seed, step, name)  # its own masks and stochastic depth
                gradients[name] = compute_gradients(
                    runtime, trainer.model, optimizer, scaler, micro_batches, trainer.loss_fn
                )
            results = apply_gradients(runtime, gradients, config.clip_grad, agreement)
            done = step + 1
            log.step(
                done,
                images_after(done),
                waiting,
                **student_metrics(runtime, trainers, results, rates),
                teacher={"health": health.measure},
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


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, start, train; a mistake or a failure ends the program with one line."""
    config = parse(DistillConfig, argv, prog="main_distill.py")
    run_program("main_distill.py", config, distill, failures=(DataError,))


if __name__ == "__main__":
    main()
