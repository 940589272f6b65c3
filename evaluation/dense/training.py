"""Train the head of a probe, and with it some of the encoder if asked for.

Letters: B crops of a rank and step, O outputs, S side of a crop.
"""

from functools import partial
from typing import Any

import torch
from dense.data import Example, PairDataset, StepSampler, train_batches
from dense.probe import Probe
from dense.results import publish
from dense.testing import evaluate
from torch import Tensor, nn
from training_loop import Training, check_shares, setting_of, train
from tuning import make_optimizer

from pixio.engine.schedule import poly
from pixio.images.normalization import normalize


def train_head(probe: Probe, crops: PairDataset) -> list[dict[str, Any]]:
    """Train to the end, evaluating on the way; see `training_loop.train`.

    Returns:
        The metrics of every evaluation, with their `epoch`.

    Raises:
        ValueError: the ranks cannot share a step, or see there.
    """
    config, runtime = probe.config, probe.runtime
    check_shares(config, runtime)
    sampler = StepSampler(len(crops), config.batch_size * config.batches_per_step, config.seed)
    total = config.epochs * sampler.steps_per_epoch
    return train(
        Training(
            config=config,
            runtime=runtime,
            output=probe.output,
            module=probe.learner,
            optimizer=make_optimizer(config, probe.head, probe.frozen.encoder),
            steps_per_epoch=sampler.steps_per_epoch,
            per_step=sampler.per_step,
            batches=lambda start, stop: train_batches(
                crops,
                sampler.keys(start, stop, runtime.rank, runtime.world_size),
                config.num_workers,
                runtime.pins_memory,
            ),
            loss=partial(loss_of, probe),
            lr=partial(
                poly, base_lr=config.lr, warmup_steps=int(probe.task.warmup * total), total_steps=total
            ),
            evaluate=partial(evaluate, probe),
            publish=partial(publish, probe, len(crops)),
            setting=setting_of(config, train=len(crops), val=len(probe.val), **probe.identity),
        )
    )


def loss_of(probe: Probe, model: nn.Module, crops: Example) -> Tensor:
    """The mean over the batches of a rank and step, each of `batch_size` crops and with a loss of its own."""
    images = normalize(crops.image.to(probe.runtime.device, non_blocking=True))
    targets = crops.target.to(probe.runtime.device, non_blocking=True)
    # a frozen encoder is no part of what is trained, nor of what is copied to the ranks
    seen = images if probe.config.tunes else probe.frozen(images)
    logits = model(seen, images.shape[-2:])  # [B, O, S, S]
    size = probe.config.batch_size
    batches = zip(logits.split(size), targets.split(size), strict=True)
    return torch.stack([probe.task.loss(*batch) for batch in batches]).mean()
