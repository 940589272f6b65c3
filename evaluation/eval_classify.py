"""Classification: a probe on a frozen encoder, or some of the encoder trained with it (docs/fine_tuning.md).

    python eval_classify.py --encoder pixio_vith16 --pretrained_ckp FILE --data_path DIR --probe attentive
    python eval_classify.py … --train_blocks 4 --drop_path 0.3
    torchrun --nproc_per_node 8 eval_classify.py …

DIR holds `train/CLASS/*` and `val/CLASS/*`, or tars `*train*.tar` and `*val*.tar` with KEY.jpg and KEY.cls.
Training follows MAE (https://github.com/facebookresearch/mae), with timm's augmentation and mixup. The same
command resumes a run that was stopped. `results.json`, `probe.pth`, `log.jsonl` and, of a trained encoder,
`encoder.pth` lie in `--output_dir`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from classify.data import Batch, LabeledImages, batches, center, open_images, seeded
from classify.heads import Classifier, make_probe
from dense.data import StepSampler
from launch import run_evaluation
from results import last_and_best, write_results
from timm.data import Mixup, create_transform
from torch import Tensor, nn
from tqdm import tqdm
from training_loop import Training, TrainingConfig, check_shares, setting_of, train
from tuning import export_encoder, load_trainable, make_optimizer

from pixio.engine.config import option, parse
from pixio.engine.lock import lock_folder
from pixio.engine.runtime import Runtime
from pixio.engine.schedule import warmup_cosine
from pixio.engine.signals import Preempted, defer_signals
from pixio.files import write_atomic
from pixio.models.external import fingerprint
from pixio.models.finetuning import train_last_blocks

PROGRAM = "eval_classify.py"
METRICS = {"top1": True, "top5": True}


# ---------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(TrainingConfig):
    """Train a classifier on a frozen encoder, or fine-tune encoder blocks with it, and evaluate it."""

    encoder: str = option("pixio_vith16", "pixio_… or timm/NAME; hf/FOLDER if frozen", aliases=("model",))
    probe: Literal["linear", "attentive"] = option(
        "linear",
        "linear: BatchNorm and a linear layer on the mean class token; attentive: with attention pooling",
    )
    data_path: str = option(
        "data/imagenet", "folder with train/CLASS/* and val/CLASS/*, or tars", aliases=("data_root",)
    )
    input_size: int = option(256, "crop size in pixels, rounded down to a multiple of the patch size", ge=1)
    epochs: int = option(50, "passes over the training images", ge=1)
    warmup_epochs: int = option(5, "epochs of linear warm-up from 0", ge=0)
    batch_size: int = option(32, "images per batch; mixup and cutmix mix within it", ge=2)
    lr: float = option(
        1e-3,
        "peak learning rate, for any number of ranks; the default is MAE's, for 256 images per step",
        gt=0,
    )
    encoder_lr: float | None = option(None, "peak learning rate of the trained blocks; by default --lr", gt=0)
    weight_decay: float = option(0.05, "AdamW decay", ge=0)
    # augmentation; none = MAE's where some of the encoder is trained, else crops and mirroring alone
    rand_augment: str | None = option(
        None,
        "RandAugment in timm's notation, or off; by default rand-m9-mstd0.5-inc1, or off if frozen",
    )
    mixup: float | None = option(None, "alpha of mixup; by default 0.8, or 0 with a frozen encoder", ge=0)
    cutmix: float | None = option(None, "alpha of cutmix; by default 1, or 0 with a frozen encoder", ge=0)
    smoothing: float | None = option(
        None, "label smoothing; by default 0.1, or 0 with a frozen encoder", ge=0, lt=1
    )
    erasing: float | None = option(
        None, "probability of random erasing; by default 0.25, or 0 with a frozen encoder", ge=0, le=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % 2:
            raise ValueError(f"pairs of images are mixed: --batch_size must be even, found {self.batch_size}")
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"--warmup_epochs {self.warmup_epochs} is above --epochs, which is {self.epochs}"
            )

    def chosen(self, name: str, of_tuning: Any) -> Any:
        """A setting of the augmentation, or its default: `of_tuning` if some of the encoder is trained."""
        value = getattr(self, name)
        return (of_tuning if self.tunes else 0) if value is None else value

    @property
    def peak_encoder_lr(self) -> float:
        return self.encoder_lr or self.lr


# ---------------------------------------------------------------------------------------------- the run
def evaluate(config: ClassifyConfig, runtime: Runtime) -> dict[str, Any]:
    """Train and measure a classifier; another run in the same folder is refused while this one lasts.

    Returns:
        What `results.json` holds.
    """
    check_shares(config, runtime)
    images = open_images(Path(config.data_path), "train")
    val = open_images(Path(config.data_path), "val", images.classes)
    torch.manual_seed(config.seed)  # all ranks alike
    encoder = load_trainable(config, config.encoder)
    size = config.input_size // encoder.patch_size * encoder.patch_size
    if size == 0:
        raise ValueError(
            f"--input_size {config.input_size} is below the patch size, {encoder.patch_size} pixels"
        )
    sha256 = runtime.gather(fingerprint(encoder) if runtime.is_main else None)[0]
    train_last_blocks(encoder, config.blocks_to_train)
    probe = make_probe(config.probe, encoder.embed_dim, len(images.classes), runtime)
    model = Classifier(encoder, probe).to(runtime.device)
    name = f"classify_{config.probe}_{Path(config.encoder).name}_{sha256[:8]}"
    name += f"_train_{config.train_blocks}" if config.tunes else ""
    output = Path(config.output_dir or f"runs/{name}")

    facts = {"train": len(images), "val": len(val), "classes": len(images.classes), "encoder_sha256": sha256}
    sampler = StepSampler(len(images), config.batch_size * config.batches_per_step, config.seed)
    total = config.epochs * sampler.steps_per_epoch
    rate = {"base_lr": config.lr, "min_lr": 0.0, "total_steps": total}
    publish = partial(publish_rows, config, runtime, output, facts)
    run = Training(
        config=config,
        runtime=runtime,
        output=output,
        module=model if config.tunes else probe,
        optimizer=make_optimizer(config, probe, encoder),
        steps_per_epoch=sampler.steps_per_epoch,
        per_step=sampler.per_step,
        batches=lambda start, stop: batches(
            images,
            sampler.keys(start, stop, runtime.rank, runtime.world_size),
            augmentation(config, size),
            config.num_workers,
            runtime.pins_memory,
        ),
        loss=partial(loss_of, config, runtime, model, mixing(config, len(images.classes))),
        lr=partial(warmup_cosine, warmup_steps=config.warmup_epochs * sampler.steps_per_epoch, **rate),
        evaluate=partial(measure, config, runtime, model, val, size),
        publish=publish,
        setting=setting_of(config, **facts),
    )
    with lock_folder(output, runtime):
        with defer_signals():
            rows = train(run)
        if runtime.is_main:
            content = {"probe": config.probe, "classes": images.classes, "state": probe.state_dict()}
            write_atomic(output / "probe.pth", lambda file: torch.save(content, file))
            if config.tunes:
                export_encoder(encoder, output / "encoder.pth")
        return publish(rows)


def augmentation(config: ClassifyConfig, size: int) -> Callable[..., Tensor]:
    """What training does to an image: timm's, on PIL images -> normalized float32 [3, S, S]."""
    policy = config.chosen("rand_augment", "rand-m9-mstd0.5-inc1")
    return create_transform(
        size,
        is_training=True,
        color_jitter=None,
        auto_augment=None if policy in (0, "off") else policy,
        interpolation="bicubic",
        re_prob=config.chosen("erasing", 0.25),
        re_mode="pixel",
    )


def mixing(config: ClassifyConfig, classes: int) -> Mixup:
    """timm's mixup and cutmix, with label smoothing; without either it only smooths."""
    mixup, cutmix = config.chosen("mixup", 0.8), config.chosen("cutmix", 1.0)
    smoothing = config.chosen("smoothing", 0.1)
    mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)
    mix.mixup_enabled = mixup > 0 or cutmix > 0
    return mix


def loss_of(
    config: ClassifyConfig, runtime: Runtime, model: Classifier, mix: Mixup, learner: nn.Module, batch: Batch
) -> Tensor:
    """Cross-entropy of a rank's images, mixed within batches of `batch_size`, each in its own way."""
    images, labels = (part.to(runtime.device, non_blocking=True) for part in (batch.images, batch.labels))
    mixed = []
    for first in range(0, len(images), config.batch_size):
        group = slice(first, first + config.batch_size)
        with seeded(*batch.seeds[first]):
            mixed.append(mix(images[group].clone(), labels[group]))
    images, targets = (torch.cat(parts) for parts in zip(*mixed, strict=True))  # [B, 3, S, S], [B, classes]
    logits = learner(images if config.tunes else model.features(images))
    return F.cross_entropy(logits.float(), targets)


# ---------------------------------------------------------------------------------------------- results
@torch.inference_mode()
def measure(
    config: ClassifyConfig, runtime: Runtime, model: Classifier, val: LabeledImages, size: int
) -> dict[str, float]:
    """Collective: top-1 and top-5 accuracy over all validation images, in percent.

    Raises:
        Preempted: on all ranks, when one is asked to stop.
    """
    model.eval()
    mine, count = range(runtime.rank, len(val), runtime.world_size), 2 * config.batch_size
    keys = [[(i, 0) for i in mine[first : first + count]] for first in range(0, len(mine), count)]
    read = batches(val, iter(keys), center(size), config.num_workers, runtime.pins_memory)
    right = torch.zeros(2, dtype=torch.int64)
    hidden = None if runtime.is_main else True  # None: where nobody watches
    for number, batch in enumerate(tqdm(read, "evaluate", len(keys), leave=False, disable=hidden)):
        with runtime.autocast():
            logits = model(batch.images.to(runtime.device, non_blocking=True))
        best = logits.float().topk(min(5, logits.shape[1])).indices.cpu()  # [B, 5]
        hits = best == batch.labels[:, None]
        right += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
        everyone = (number + 1) * count <= len(val) // runtime.world_size  # has images in this round
        if everyone and runtime.asked_to_stop():
            raise Preempted
    model.train()
    shares = 100 * torch.stack(runtime.gather(right)).sum(0).double() / len(val)
    return dict(zip(METRICS, shares.tolist(), strict=True))


def publish_rows(
    config: ClassifyConfig, runtime: Runtime, output: Path, facts: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write `results.json` from all evaluations so far; returns what it holds."""
    results = {
        "task": "classify",
        "probe": config.probe,
        "encoder": config.encoder,
        "pretrained_ckp": config.pretrained_ckp,
        "encoder_sha256": facts["encoder_sha256"],
        "counts": {key: facts[key] for key in ("train", "val", "classes")},
        **last_and_best(rows, METRICS),
        "seconds": rows[-1]["seconds"],
        "ranks": runtime.world_size,
        "device": runtime.device.type,
        "config": asdict(config),
        "evaluations": rows,
    }
    return write_results(results, METRICS, output, runtime)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse and run; returns what `results.json` holds. A mistake ends the program with one line."""
    config = parse(ClassifyConfig, argv, prog=PROGRAM)
    return run_evaluation(PROGRAM, config, partial(evaluate, config))


if __name__ == "__main__":
    main()
