"""A probe: a head on a frozen encoder, and what depth and segmentation differ in.

Letters: n windows, O outputs of a head, B crops, H x W pixels, S side of a crop or window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense.config import DenseConfig
from dense.data import DataSource, PairDataset, open_split
from torch import Tensor, nn
from training_loop import check_same
from tuning import export_encoder, load_trainable

from pixio.dense import (
    FeatureMaps,
    FrozenEncoder,
    HeadFile,
    Output,
    Predictor,
    TunedEncoder,
    head_blocks,
    make_head,
    read_head,
    window_of,
)
from pixio.engine.runtime import Runtime, place_frozen
from pixio.images.panels import Maps
from pixio.models.external import depth_of, fingerprint


@dataclass(frozen=True)
class Task:
    """What depth and segmentation differ in.

    Attributes:
        name: "monodepth" or "semseg".
        data: the images and their targets.
        output: what the head's outputs stand for.
        identity: settings beside the sizes that a trained head is bound to.
        warmup: share of the steps in which the learning rate rises.
        metrics: name -> whether higher is better.
        loss: logits float32 [B, O, S, S], targets [B, S, S] -> scalar.
        make_scores: an empty accumulator of metrics: `add(index, prediction, target)` fills its `state`,
            `summarize(states)` gives the metrics of all ranks.
        draw: path, images uint8 [H, W, 3], maps [H, W] by title -> writes a PNG; see `pixio.images.panels`.
    """

    name: str
    data: DataSource
    output: Output
    identity: dict[str, Any]
    warmup: float
    metrics: dict[str, bool]
    loss: Callable[[Tensor, Tensor], Tensor]
    make_scores: Callable[[], Any]
    draw: Callable[[Path, list[np.ndarray], Maps], None]


@dataclass(frozen=True)
class Probe:
    """An encoder, frozen unless asked otherwise, with a head on it, and the images both are evaluated on.

    Attributes:
        frozen: the encoder.
        window: side S and stride of the windows, in pixels.
        identity: what a trained head is bound to.
        epoch: passes over the data the head was trained for when it was loaded; 0 for a fresh one.
        output: folder of all that the run writes.
    """

    config: DenseConfig
    task: Task
    runtime: Runtime
    frozen: FeatureMaps
    head: nn.Module
    window: tuple[int, int]
    identity: dict[str, Any]
    epoch: int
    val: PairDataset
    output: Path

    @property
    def learner(self) -> nn.Module:
        """What is trained: the head, or the encoder with it."""
        return _Tuned(self.frozen, self.head) if self.config.tunes else self.head

    @property
    def predictor(self) -> Predictor:
        """What predicts for the validation images."""
        parts = self.frozen, self.head, self.task.output, self.window, self.runtime
        return Predictor(*parts, self.config.window_batch)

    def export(self) -> None:
        """Write the head, and all that is needed to predict with it: a trained encoder goes beside it."""
        encoder, identity = self.frozen.encoder, self.identity
        source = self.config.pretrained_ckp or None
        if self.config.tunes:
            source = str(self.output / "encoder.pth")
            identity = identity | {"encoder_sha256": export_encoder(encoder, Path(source))}
        local = source is not None and Path(source).exists()
        HeadFile(
            identity=identity,
            state=self.head.state_dict(),
            epoch=self.config.epochs,
            output=self.task.output,
            encoder=self.config.encoder,
            pretrained=str(Path(source).absolute()) if local else source,
            block_ids=tuple(self.frozen.block_ids),
            patch_size=encoder.patch_size,
            window=self.window,
        ).write(self.output / "head.pth")


class _Tuned(nn.Module):
    """An encoder that learns, with the head on it."""

    def __init__(self, maps: FeatureMaps, head: nn.Module):
        super().__init__()
        self.maps, self.head = maps, head

    def forward(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        return self.head(self.maps(images), size)


def build_probe(config: DenseConfig, task: Task, runtime: Runtime) -> Probe:
    """Validation images, encoder, head (fresh, or with `eval_only` the trained one), output folder.

    Raises:
        ValueError, OSError: a mistake in settings or files; the message names it.
    """
    val = open_split(task.data, config, "val", None, runtime.is_main)
    trained = read_head(Path(config.head)) if config.eval_only else None
    kind = trained.identity["head"] if trained else config.head
    torch.manual_seed(config.seed)  # all ranks alike: of the head, and of an encoder without weights
    encoder = load_trainable(config, config.encoder)
    window = window_of(config.crop_size, encoder.patch_size)
    parts = encoder, head_blocks(kind, depth_of(encoder)), config.cls_concat
    frozen = TunedEncoder(*parts, config.blocks_to_train) if config.tunes else FrozenEncoder(*parts)
    identity = {
        "task": task.name,
        "head": kind,
        "encoder_sha256": runtime.gather(fingerprint(encoder) if runtime.is_main else None)[0],
        "cls_concat": config.cls_concat,
        "channels": frozen.channels,
        "outputs": task.output.count,
        **task.identity,
    }
    if trained:
        check_same(trained.identity, identity, f"{config.head} was trained with", "give it the same")
        head = trained.make_head()
    else:
        head = make_head(kind, frozen.channels, task.output.count, runtime, config.dpt_width)
    name = f"{config.dataset}_{kind}_{Path(config.encoder).name}_{identity['encoder_sha256'][:8]}"
    name += f"_train_{config.train_blocks}" if config.tunes else ""
    output = Path(config.output_dir or f"runs/{name}{'_eval' if config.eval_only else ''}")
    if config.eval_only and (output / "checkpoints").exists():
        raise ValueError(f"{output} holds the training of a head: choose another --output_dir")
    output.mkdir(parents=True, exist_ok=True)
    if not config.tunes:
        place_frozen(frozen, runtime.device, runtime.dtype)
    return Probe(
        config=config,
        task=task,
        runtime=runtime,
        frozen=frozen.to(runtime.device),
        head=head.to(runtime.device),
        window=window,
        identity=identity,
        epoch=trained.epoch if trained else 0,
        val=val,
        output=output,
    )
