"""Depth and segmentation with a frozen encoder: settings, setting up, training a head, and evaluating it.

A `Task` says in what the two differ. Letters: B crops of a rank, n windows, O outputs of a head, H x W
pixels, S side of a crop or window.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import torch
from pairs import Item, Order, Pairs, train_batches, whole_items
from torch import Tensor, nn
from tqdm import tqdm

from pixio.dense.frozen import FrozenEncoder
from pixio.dense.heads import KINDS, head_blocks, make_head
from pixio.dense.sliding import slide
from pixio.engine.checkpoint import Checkpoints, Interval, restore
from pixio.engine.config import option
from pixio.engine.logger import Log
from pixio.engine.optim import set_lr
from pixio.engine.runtime import Runtime, start_runtime
from pixio.engine.schedule import poly
from pixio.engine.step import NonFiniteLoss, accumulate
from pixio.files import write_atomic
from pixio.images.normalization import normalize
from pixio.models.external import depth_of, fingerprint, load_encoder
from pixio.weights.reading import read_file


# ---------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Settings of depth and segmentation alike; the recipes are the YAML files."""

    config: str | None = option(None, "YAML file with any of these; the command line wins")
    encoder: str = option("pixio_vith16", "pixio_…, timm/NAME or hf/FOLDER", aliases=("model",))
    pretrained_ckp: str | None = option(
        None, "weight file of the encoder; none = random, or the folder's own"
    )
    cls_concat: Literal["mean", "none"] = option(
        "mean", "what stands beside each patch token: the mean of the class (and register) tokens, or nothing"
    )
    # data
    data_root: str = option("", "folder of the data set")
    train_split_file: str | None = option(None, "list of `IMAGE TARGET` lines instead of the data set's rule")
    val_split_file: str | None = option(None, "the same for validation")
    expect_count: bool = option(False, "another number of images than published is an error, not a warning")
    num_workers: int = option(4, "loading processes per rank")
    # head
    head: str = option("dpt", "linear, dpt, or the file of a trained head for --eval_only")
    eval_only: bool = option(False, "train nothing: evaluate --head FILE")
    epochs: int = option(60, "passes over the training images")
    batch_size: int = option(4, "crops that share one loss: those of one GPU in the published recipes")
    batches_per_step: int = option(
        8, "such batches per optimizer step, shared among the ranks: published are 8 GPUs with one each"
    )
    lr: float = option(1e-4, "peak learning rate, for any number of ranks")
    weight_decay: float = option(0.01, "AdamW decay")
    crop_size: int = option(256, "side of crops and windows, lowered to a multiple of the patch size; pixels")
    seed: int = option(0, "of the head's first weights, the order of the images and their crops")
    # evaluation
    window_batch: int = option(16, "windows that go through the network together; changes nothing but speed")
    eval_freq: int = option(1, "epochs between evaluations; the last epoch always ends with one")
    panels: int = option(4, "validation images in panels.png; 0 = no picture")
    # run
    output_dir: str | None = option(None, "what the run writes; by default a folder named after it in runs/")
    save_minutes: float = option(10.0, "minutes between checkpoints within an epoch; 0 = at its end only")
    log_freq: int = option(20, "steps between log lines")
    device: str = option("auto", "auto, cpu, mps or a GPU")
    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", "what autocast computes in")
    port: int | None = option(None, "where ranks meet, if their launcher does not say")

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "batches_per_step": 1, "window_batch": 1, "eval_freq": 1}
        for name, minimum in (least | {"crop_size": 1, "panels": 0, "num_workers": 0, "seed": 0}).items():
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name} must be at least {minimum}, found {getattr(self, name)}")
        if self.eval_only and self.head in KINDS:
            raise ValueError(f"--eval_only needs the file of a trained head, found --head {self.head}")
        if not self.eval_only and self.head not in KINDS:
            raise ValueError(
                f"--head {self.head} is neither {' nor '.join(KINDS)}; the file of a trained head needs "
                "--eval_only"
            )


# Settings that change where and how fast a run goes, but not its figures; others must be equal to resume it.
HARMLESS = (
    *("config", "encoder", "pretrained_ckp", "data_root", "output_dir", "expect_count", "device", "port"),
    *("num_workers", "window_batch", "eval_freq", "panels", "save_minutes", "log_freq"),
)


class Scores(Protocol):
    """Metrics in the making: `add` fills the `state` of a rank, `summarize` merges those of all."""

    state: Any

    def add(self, index: int, prediction: Tensor, target: Tensor) -> None: ...

    def summarize(self, states: list[Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Task:
    """What depth and segmentation differ in.

    Attributes:
        name: "monodepth" or "semseg".
        outputs: O.
        identity: settings beside the sizes that a trained head is bound to.
        warmup: share of the steps in which the learning rate rises.
        metrics: name -> whether higher is better.
        open_split: "train" or "val", split file or None, crop size (None = whole) -> the items.
        loss: logits float32 [B, O, S, S], targets [B, S, S] -> scalar.
        average: logits [n, O, S, S] -> what is averaged where windows overlap, same shape.
        decide: averages [O, H, W] -> the prediction for an image [H, W], metres or classes.
        make_scores: gives an empty `Scores`.
        draw: file, images uint8 [3, H, W], targets and predictions [H, W] -> writes a PNG.
        class_names: in the order of the results per class; empty for depth.
    """

    name: str
    outputs: int
    identity: dict[str, Any]
    warmup: float
    metrics: dict[str, bool]
    open_split: Callable[[str, str | None, int | None], Pairs]
    loss: Callable[[Tensor, Tensor], Tensor]
    average: Callable[[Tensor], Tensor]
    decide: Callable[[Tensor], Tensor]
    make_scores: Callable[[], Scores]
    draw: Callable[[BinaryIO, list[Tensor], list[Tensor], list[Tensor]], None]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench:
    """A frozen encoder with a head on it, and the images both are measured on.

    Attributes:
        size: S in pixels.
        stride: pixels between neighbouring windows.
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
    val: Pairs
    output: Path


# ---------------------------------------------------------------------------------------------- setting up
def set_up(config: DenseConfig, task: Task, runtime: Runtime) -> Bench:
    """Validation images, encoder, head (fresh, or with `eval_only` the trained one), output folder.

    Raises:
        ValueError, OSError: a mistake in settings or files; the message names it.
    """
    val = open_split(task, config, runtime, "val", None)
    trained = read_head(Path(config.head)) if config.eval_only else None
    kind = trained["identity"]["head"] if trained else config.head
    torch.manual_seed(config.seed)  # all ranks alike: of the head, and of an encoder without weights
    encoder = load_encoder(config.encoder, config.pretrained_ckp)
    patch = encoder.patch_size
    size = config.crop_size // patch * patch
    if size == 0:
        raise ValueError(f"--crop_size {config.crop_size} is below the patch size, {patch} pixels")
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
    return Bench(
        config,
        task,
        runtime,
        frozen.to(runtime.device),
        head.to(runtime.device),
        size,
        int(size * 2 / 3),
        identity,
        trained["epoch"] if trained else 0,
        val,
        output,
    )


def open_split(task: Task, config: DenseConfig, runtime: Runtime, split: str, crop_size: int | None) -> Pairs:
    """A split of the data, complaining if its number of images is not the published one."""
    split_file = config.train_split_file if split == "train" else config.val_split_file
    pairs = task.open_split(split, split_file, crop_size)
    if pairs.complaint and config.expect_count:
        raise ValueError(pairs.complaint)
    if pairs.complaint and runtime.is_main:
        print(f"warning: {pairs.complaint}", file=sys.stderr)
    return pairs


def read_head(path: Path) -> dict[str, Any]:
    """A head file that `train_head` wrote: `identity`, `epoch` and the `state` of the module.

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


# ---------------------------------------------------------------------------------------------- evaluation
def predict(bench: Bench, item: Item) -> Tensor:
    """Sliding-window prediction for one image: metres or classes, [H, W].

    Raises:
        ValueError: it is not finite; the message names the image.
    """

    def predict_windows(windows: Tensor) -> Tensor:
        with bench.runtime.autocast():
            logits = bench.head(bench.frozen(windows), windows.shape[-2:])  # [n, O, S, S]
        return bench.task.average(logits)

    image = normalize(item.image.to(bench.runtime.device, non_blocking=True))
    averages = slide(predict_windows, image, bench.size, bench.stride, bench.config.window_batch)
    if not averages.isfinite().all():
        raise ValueError(
            f"the prediction for {item.names[0]} is not finite: the head has diverged, or the encoder "
            "overflows; lower --lr, or use --dtype fp32"
        )
    return bench.task.decide(averages)


@torch.inference_mode()
def evaluate(bench: Bench) -> dict[str, Any]:
    """Collective: the metrics of all validation images, each seen by exactly one rank."""
    runtime, scores = bench.runtime, bench.task.make_scores()
    indices = range(runtime.rank, len(bench.val), runtime.world_size)
    items = whole_items(bench.val, indices, bench.config.num_workers, runtime.pins_memory)
    bench.head.eval()
    hidden = None if runtime.is_main else True  # None: where nobody watches
    for index, item in tqdm(items, "evaluate", len(indices), leave=False, disable=hidden):
        scores.add(index, predict(bench, item), item.target.to(runtime.device))
    bench.head.train()
    return scores.summarize(runtime.gather(scores.state))


@torch.inference_mode()
def draw_panels(bench: Bench) -> None:
    """Picture of a few validation images, evenly spaced; rank 0 alone."""
    if not bench.runtime.is_main or not bench.config.panels:
        return
    count = min(bench.config.panels, len(bench.val))
    indices = [i * len(bench.val) // count for i in range(count)]
    items = [item for _, item in whole_items(bench.val, indices, num_workers=0, pin_memory=False)]
    bench.head.eval()
    predictions = [predict(bench, item).cpu() for item in items]
    bench.head.train()
    images, targets = [item.image for item in items], [item.target for item in items]
    write_atomic(
        bench.output / "panels.png", lambda file: bench.task.draw(file, images, targets, predictions)
    )


# ---------------------------------------------------------------------------------------------- training
def train_head(bench: Bench, train: Pairs) -> list[dict[str, Any]]:
    """Train the head to the end, evaluating on the way; goes on where an earlier run stopped.

    Returns:
        The metrics of every evaluation, with their `epoch`.

    Raises:
        ValueError: the ranks cannot share a step, the folder holds another run, or the loss is not finite.
    """
    config, runtime, head = bench.config, bench.runtime, bench.head
    if config.batches_per_step % runtime.world_size:
        raise ValueError(
            f"{config.batches_per_step} batches per step cannot be shared by {runtime.world_size} ranks: "
            "start a number of ranks that divides it, or change --batches_per_step"
        )
    order = Order(len(train), config.batch_size * config.batches_per_step, config.seed)
    total = config.epochs * order.steps_per_epoch
    warmup = int(bench.task.warmup * total)
    model = runtime.wrap(head)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay
    )
    scaler = runtime.make_scaler()

    # ---- resume
    checkpoints = Checkpoints(bench.output / "checkpoints", runtime, keep_newest=1)
    setting = {key: value for key, value in asdict(config).items() if key not in HARMLESS}
    setting |= {"train": len(train), "val": len(bench.val), **bench.identity}
    setting = {key: str(value) for key, value in setting.items()}
    start, rows, seconds = 0, [], 0.0
    if state := checkpoints.load_latest():
        what = f"{bench.output} holds a run with"
        check_same(state.get("setting", {}), setting, what, "choose another --output_dir")
        start, rows, seconds = state["step"], state["rows"], state["seconds"]
        restore(head, optimizer, state)
        scaler.load_state_dict(state["scaler"])
    began = time.monotonic() - seconds

    # ---- loop
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

    log = Log(bench.output, total, runtime.is_main, start_step=start, every=config.log_freq)
    interval = Interval(runtime, minutes=config.save_minutes)
    keys = order.keys(start, total, runtime.rank, runtime.world_size)
    batches = train_batches(train, keys, config.num_workers, runtime.pins_memory)
    head.train()
    for step in range(start, total):
        waiting = time.perf_counter()
        crops = next(batches)
        waiting = time.perf_counter() - waiting
        lr = poly(step, config.lr, warmup, total)
        set_lr(optimizer, lr)
        try:
            result = accumulate(runtime, model, optimizer, scaler, [crops], partial(loss_of, bench))
        except NonFiniteLoss as error:
            raise ValueError(f"{error}. Rank {runtime.rank} had read {', '.join(crops.names)}") from error
        done = step + 1
        log.step(
            done,
            done * order.per_step,
            waiting,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            memory=runtime.memory,
        )
        epoch, within = divmod(done, order.steps_per_epoch)
        if within == 0:
            if epoch % config.eval_freq == 0 or epoch == config.epochs:
                rows.append({"epoch": epoch, "seconds": time.monotonic() - began, **evaluate(bench)})
                if done < total:  # the last are published by `run`, once the checkpoint is written
                    publish(bench, len(train), rows)
            save(done)
        elif interval.due(done):
            save(done)
    log.close()
    return rows


def loss_of(bench: Bench, model: nn.Module, crops: Item) -> Tensor:
    """The mean over the batches of a rank and step, each of `batch_size` crops and with a loss of its own."""
    images = normalize(crops.image.to(bench.runtime.device, non_blocking=True))
    targets = crops.target.to(bench.runtime.device, non_blocking=True)
    logits = model(bench.frozen(images), images.shape[-2:])  # [B, O, S, S]
    size = bench.config.batch_size
    batches = zip(logits.split(size), targets.split(size), strict=True)
    return torch.stack([bench.task.loss(*batch) for batch in batches]).mean()


# ---------------------------------------------------------------------------------------------- results
def publish(bench: Bench, trained_on: int | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank 0 writes `results.json`, from all evaluations so far.

    Args:
        bench: what was evaluated.
        trained_on: number of training images.
        rows: metrics of every evaluation, with `epoch` and `seconds` since the start, over all restarts.

    Returns:
        What the file holds.
    """
    config, last, best = bench.config, rows[-1], {}
    for metric, higher in bench.task.metrics.items():
        row = (max if higher else min)(rows, key=lambda row, metric=metric: row[metric])
        best[metric] = {"value": row[metric], "epoch": row["epoch"]}
    results = {
        "dataset": config.dataset,
        **bench.identity,
        "encoder": config.encoder,
        "pretrained_ckp": config.pretrained_ckp,
        "counts": {"train": trained_on, "val": len(bench.val)},
        "last": {metric: last[metric] for metric in ("epoch", *bench.task.metrics)},
        "best": best,
        "per_class": dict(zip(bench.task.class_names, last.get("iou", ()), strict=True)),
        "seconds": last["seconds"],
        "blocks": bench.frozen.block_ids,
        "window": {"size": bench.size, "stride": bench.stride},
        "ranks": bench.runtime.world_size,
        "device": bench.runtime.device.type,
        "config": asdict(config),
        "evaluations": rows,
    }
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    if bench.runtime.is_main:
        write_atomic(bench.output / "results.json", lambda file: file.write(text.encode()))
        figures = ", ".join(f"{metric} {last[metric]:.4g}" for metric in bench.task.metrics)
        print(f"{bench.output}: epoch {last['epoch']}: {figures}", flush=True)
    return json.loads(text)


# ---------------------------------------------------------------------------------------------- the program
def run(config: DenseConfig, task: Task, runtime: Runtime) -> dict[str, Any]:
    """Train a head on frozen features and evaluate it, or with `eval_only` evaluate a trained one.

    Returns:
        What `results.json` in the output folder holds; beside it lie `head.pth`, `panels.png`, `log.jsonl`.
    """
    bench = set_up(config, task, runtime)
    if config.eval_only:
        began = time.monotonic()
        rows = [{"epoch": bench.epoch, **evaluate(bench), "seconds": time.monotonic() - began}]
        results = publish(bench, None, rows)
    else:
        train = open_split(task, config, runtime, "train", bench.size)
        rows = train_head(bench, train)
        if runtime.is_main:
            trained = {"identity": bench.identity, "epoch": config.epochs, "state": bench.head.state_dict()}
            write_atomic(bench.output / "head.pth", lambda file: torch.save(trained, file))
        results = publish(bench, len(train), rows)
    draw_panels(bench)
    return results


def main(program: str, config: DenseConfig, task: Task) -> dict[str, Any]:
    """Start, run; a mistake or a failure ends the program with one line.

    Returns:
        See `run`.
    """
    if config.port is not None:
        os.environ.setdefault("MASTER_PORT", str(config.port))
    try:
        runtime = start_runtime(config.device, config.dtype)
        try:
            return run(config, task, runtime)
        finally:
            runtime.close()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"{program}: error: {error}") from error
