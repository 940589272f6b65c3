"""Train the head of a probe. Letters: B crops of a rank and step, O outputs, S side of a crop."""

import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from dense.data import Example, PairDataset, StepSampler, train_batches
from dense.probe import Probe, check_same
from dense.results import publish
from dense.testing import evaluate
from torch import Tensor, nn

from pixio.engine.checkpoint import Checkpoints, Interval, restore
from pixio.engine.logger import Log
from pixio.engine.optim import set_lr
from pixio.engine.schedule import poly
from pixio.engine.signals import Preempted
from pixio.engine.step import NonFiniteLoss, accumulate
from pixio.engine.training import say_stopped
from pixio.images.normalization import normalize

# Settings that change where and how fast a run goes, but not its metrics; others must be equal to resume it.
RESUME_IGNORES = (
    *("config", "encoder", "pretrained_ckp", "data_root", "output_dir", "expect_count", "device", "port"),
    *("local_rank", "num_workers", "window_batch", "eval_freq", "panels", "save_minutes", "log_freq"),
)


def train_head(probe: Probe, train: PairDataset) -> list[dict[str, Any]]:
    """Train the head to the end, evaluating on the way; resumes where an earlier run stopped.

    Asked to stop, it saves and raises `Preempted`, after a step or between two images of an evaluation, which
    the run that resumes then makes from its beginning.

    Returns:
        The metrics of every evaluation, with their `epoch`.

    Raises:
        ValueError: the ranks cannot share a step, the folder holds another run, or the loss is not finite.
    """
    config, runtime, head = probe.config, probe.runtime, probe.head
    if config.batches_per_step % runtime.world_size:
        raise ValueError(
            f"{config.batches_per_step} batches per step cannot be shared by {runtime.world_size} ranks: "
            "start a number of ranks that divides it, or change --batches_per_step"
        )
    sampler = StepSampler(len(train), config.batch_size * config.batches_per_step, config.seed)
    total = config.epochs * sampler.steps_per_epoch
    warmup = int(probe.task.warmup * total)
    model = runtime.wrap(head)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay
    )
    scaler = runtime.make_scaler()

    # ---- resume
    checkpoints = Checkpoints(probe.output / "checkpoints", runtime, keep_newest=1)
    setting = asdict(config) | {"train": len(train), "val": len(probe.val), **probe.identity}
    setting = {key: str(value) for key, value in setting.items() if key not in RESUME_IGNORES}
    start, rows, seconds = 0, [], 0.0
    if state := checkpoints.load_latest():
        what = f"{probe.output} holds a run with"
        saved = {"apply_exif": "False"} | state.get("setting", {})  # an option that older runs lack
        check_same(saved, setting, what, "choose another --output_dir")
        start, rows, seconds = state["step"], state["rows"], state["seconds"]
        restore(head, optimizer, state, scaler)
    began = time.monotonic() - seconds

    def save(step: int) -> None:
        checkpoints.save(
            step,
            {
                "model": head.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "rows": rows,
                "seconds": time.monotonic() - began,
                "setting": setting,
            },
        )

    def evaluate_if_due(step: int) -> bool:
        """Evaluate after the last step of an epoch that asks for it, unless this has been done."""
        epoch, within = divmod(step, sampler.steps_per_epoch)
        asked = epoch > 0 and within == 0 and (epoch % config.eval_freq == 0 or epoch == config.epochs)
        if not asked or epoch in (row["epoch"] for row in rows):
            return False
        rows.append({"epoch": epoch, "seconds": time.monotonic() - began, **evaluate(probe)})
        if step < total:  # the last are published once the checkpoint is written
            publish(probe, len(train), rows)
        return True

    if evaluate_if_due(start):  # what an earlier run was stopped in
        save(start)

    # ---- loop
    log = Log(probe.output, total, runtime.is_main, start_step=start, every=config.log_freq)
    interval = Interval(runtime, minutes=config.save_minutes)
    keys = sampler.keys(start, total, runtime.rank, runtime.world_size)
    batches = train_batches(train, keys, config.num_workers, runtime.pins_memory)
    head.train()
    for step in range(start, total):
        waiting = time.perf_counter()
        crops = next(batches)
        waiting = time.perf_counter() - waiting
        lr = poly(step, config.lr, warmup, total)
        set_lr(optimizer, lr)
        try:
            result = accumulate(runtime, model, optimizer, scaler, [crops], partial(loss_of, probe))
        except NonFiniteLoss as error:
            raise ValueError(f"{error}. Rank {runtime.rank} had read {', '.join(crops.names)}") from error
        done = step + 1
        metrics = {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm, "memory": runtime.memory}
        log.step(done, done * sampler.per_step, waiting, **metrics)
        try:
            if runtime.asked_to_stop():
                raise Preempted
            evaluate_if_due(done)
        except Preempted:
            save(done)
            say_stopped(runtime, done, total)
            log.close()
            raise
        if done % sampler.steps_per_epoch == 0 or interval.due(done):
            save(done)
    log.close()
    return rows


def loss_of(probe: Probe, model: nn.Module, crops: Example) -> Tensor:
    """The mean over the batches of a rank and step, each of `batch_size` crops and with a loss of its own."""
    images = normalize(crops.image.to(probe.runtime.device, non_blocking=True))
    targets = crops.target.to(probe.runtime.device, non_blocking=True)
    logits = model(probe.frozen(images), images.shape[-2:])  # [B, O, S, S]
    size = probe.config.batch_size
    batches = zip(logits.split(size), targets.split(size), strict=True)
    return torch.stack([probe.task.loss(*batch) for batch in batches]).mean()
