"""A probe: a head on a frozen encoder, and what depth and segmentation differ in.

Letters: n windows, O outputs of a head, B crops, H x W pixels, S side of a crop or window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dense.config import DenseConfig
from dense.data import DataSource, PairDataset, open_split
from torch import Tensor, nn

from pixio.dense import KINDS, FrozenEncoder, head_blocks, make_head
from pixio.engine.runtime import Runtime
from pixio.models.external import depth_of, fingerprint, load_encoder
from pixio.weights.reading import read_file


@dataclass(frozen=True)
class Task:
    """What depth and segmentation differ in.

    Attributes:
        name: "monodepth" or "semseg".
        data: the images and their targets.
        outputs: O.
        identity: settings beside the sizes that a trained head is bound to.
        warmup: share of the steps in which the learning rate rises.
        metrics: name -> whether higher is better.
        loss: logits float32 [B, O, S, S], targets [B, S, S] -> scalar.
        average: logits [n, O, S, S] -> what is averaged where windows overlap, same shape.
        decide: averages [O, H, W] -> the prediction for an image [H, W], meters or classes.
        make_scores: an empty accumulator of metrics: `add(index, prediction, target)` fills its `state`,
            `summarize(states)` gives the metrics of all ranks.
        draw: path, images uint8 [3, H, W], targets and predictions [H, W] -> writes a PNG.
        class_names: in the order of the results per class; empty for depth.
    """

    name: str
    data: DataSource
    outputs: int
    identity: dict[str, Any]
    warmup: float
    metrics: dict[str, bool]
    loss: Callable[[Tensor, Tensor], Tensor]
    average: Callable[[Tensor], Tensor]
    decide: Callable[[Tensor], Tensor]
    make_scores: Callable[[], Any]
    draw: Callable[[Path, list[Tensor], list[Tensor], list[Tensor]], None]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """A frozen encoder with a head on it, and the images both are evaluated on.

    Attributes:
        size: S in pixels.
        stride: pixels between neighboring windows.
        identity: what a trained head is bound to.
        epoch: passes over the data the head was trained for when it was loaded; 0 for a fresh one.
        output: folder of all that the run writes.
    """

    config: DenseConfig
    task: Task
    runtime: Runtime
    frozen: FrozenEncoder
    head: nn.Module
    size: int
    stride: int
    identity: dict[str, Any]
    epoch: int
    val: PairDataset
    output: Path


def build_probe(config: DenseConfig, task: Task, runtime: Runtime) -> Probe:
    """Validation images, encoder, head (fresh, or with `eval_only` the trained one), output folder.

    Raises:
        ValueError, OSError: a mistake in settings or files; the message names it.
    """
    val = open_split(task.data, config, "val", None, runtime.is_main)
    trained = read_head(Path(config.head)) if config.eval_only else None
    kind = trained["identity"]["head"] if trained else config.head
    torch.manual_seed(config.seed)  # all ranks alike: of the head, and of an encoder without weights
    encoder = load_encoder(config.encoder, config.pretrained_ckp or None)
    size = config.crop_size // encoder.patch_size * encoder.patch_size
    if size == 0:
        raise ValueError(
            f"--crop_size {config.crop_size} is below the patch size, {encoder.patch_size} pixels"
        )
    frozen = FrozenEncoder(encoder, head_blocks(kind, depth_of(encoder)), config.cls_concat)
    identity = {
        "task": task.name,
        "head": kind,
        "encoder_sha256": runtime.gather(fingerprint(encoder) if runtime.is_main else None)[0],
        "cls_concat": config.cls_concat,
        "channels": frozen.channels,
        "outputs": task.outputs,
        **task.identity,
    }
    head = make_head(kind, frozen.channels, task.outputs, runtime)
    if trained:
        check_same(trained["identity"], identity, f"{config.head} was trained with", "give it the same")
        head.load_state_dict(trained["state"])
    name = f"{config.dataset}_{kind}_{Path(config.encoder).name}_{identity['encoder_sha256'][:8]}"
    output = Path(config.output_dir or f"runs/{name}{'_eval' if config.eval_only else ''}")
    if config.eval_only and (output / "checkpoints").exists():
        raise ValueError(f"{output} holds the training of a head: choose another --output_dir")
    output.mkdir(parents=True, exist_ok=True)
    return Probe(
        config=config,
        task=task,
        runtime=runtime,
        frozen=frozen.to(runtime.device),
        head=head.to(runtime.device),
        size=size,
        stride=int(size * 2 / 3),
        identity=identity,
        epoch=trained["epoch"] if trained else 0,
        val=val,
        output=output,
    )


def read_head(path: Path) -> dict[str, Any]:
    """Read a head file that training wrote: `identity`, `epoch` and the `state` of the module.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a head.
    """
    trained = read_file(path)
    identity = trained.get("identity")
    if not isinstance(identity, dict) or identity.get("head") not in KINDS:
        raise ValueError(
            f"{path} is not a head.pth of this evaluation: its keys are {', '.join(trained)[:80]}"
        )
    return trained


def check_same(found: dict[str, Any], expected: dict[str, Any], what: str, remedy: str) -> None:
    """Refuse a file that was made with other settings: "WHAT key found, not expected: REMEDY"."""
    other = [
        f"{key} {found.get(key)}, not {expected.get(key)}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    if other:
        raise ValueError(f"{what} {'; '.join(other[:4])}: {remedy}")
