"""k-NN classification with a frozen encoder, under DINO's protocol (docs/evaluation.md).

    python eval_knn.py --model pixio_vith16 --pretrained_ckp FILE --data_path DIR
    torchrun --nproc_per_node 8 eval_knn.py …

DIR holds `train/CLASS/*` and `val/CLASS/*`. Every image becomes one vector: the mean class token of the last
block before the final norm, L2-normalized. The same command resumes a run that was stopped, and features that
are already there are used again. `results.json`, `features/` and, with `--per_block`, `blocks.png` lie in
`--output_dir`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from feature_bank import LabeledFolder, PooledFeatures, list_classes, open_bank
from launch import EvaluationConfig, run_evaluation
from torch import nn

from pixio.engine.config import option, parse
from pixio.engine.lock import lock_folder
from pixio.engine.runtime import Runtime, place_frozen
from pixio.features.extraction import FeatureExtractor
from pixio.features.knn import KNNClassifier
from pixio.features.store import FeatureStore
from pixio.files import write_json
from pixio.models.external import depth_of, fingerprint, load_encoder

PROGRAM = "eval_knn.py"


# ---------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True, kw_only=True)
class KnnConfig(EvaluationConfig):
    """Classify validation images by their nearest neighbors among the training images."""

    model: str = option("pixio_vith16", "pixio_…, timm/NAME or hf/FOLDER", aliases=("encoder",))
    pool: Literal["cls", "first", "patch"] = option(
        "cls",
        "cls: mean of the class (and register) tokens; first: only the first; patch: mean patch token",
    )
    per_block: bool = option(
        False, "also compute and plot the metrics of every block; stores the features of all blocks"
    )
    # data
    data_path: str = option(
        "data/imagenet", "folder with train/CLASS/* and val/CLASS/*", aliases=("data_root",)
    )
    input_size: int = option(
        256,
        "shorter side after resizing and side of the center crop, rounded down to whole patches",
        ge=1,
    )
    num_workers: int = option(10, "data-loading processes per rank", ge=0)
    batch_size_per_gpu: int = option(128, "images per forward pass in each rank, up to 512", ge=1)
    # search
    nb_knn: tuple[int, ...] = option(
        (10, 20, 100, 200), "numbers of neighbors k; the first is the one reported", ge=1
    )
    temperature: float = option(
        0.07, "the weight of a neighbor's vote is exp(similarity / temperature)", gt=0
    )
    memory_gb: float = option(4.0, "memory for the search in each rank, in GiB", gt=0)

    def __post_init__(self) -> None:
        if not self.nb_knn:
            raise ValueError("--nb_knn needs one number or more, found none")


# ---------------------------------------------------------------------------------------------- the run
def evaluate(config: KnnConfig, runtime: Runtime) -> dict[str, Any]:
    """Extract what features are missing, classify, and write the results.

    Returns:
        What `results.json` holds.
    """
    began = time.monotonic()
    train = list_classes(Path(config.data_path) / "train")
    val = list_classes(Path(config.data_path) / "val", train.classes)
    ks = sorted({min(k, len(train)) for k in config.nb_knn})
    if runtime.is_main and max(config.nb_knn) > len(train):
        print(f"{len(train)} training images: {len(train)} neighbors instead of up to {max(config.nb_knn)}")
    if runtime.is_main and len(train.classes) <= 5:
        print(f"{len(train.classes)} classes: top-5 counts every class that has a vote")

    # ---- features
    torch.manual_seed(0)  # all ranks alike, of an encoder without weights
    encoder = load_encoder(config.model, config.pretrained_ckp or None)
    spec = choose_features(config, encoder)
    sha256 = runtime.gather(fingerprint(encoder) if runtime.is_main else None)[0]
    output = Path(config.output_dir or f"runs/knn_{Path(config.model).name}_{sha256[:8]}")
    encoder = place_frozen(encoder, runtime.device, runtime.dtype)
    extractor = FeatureExtractor(encoder, spec, runtime, config.batch_size_per_gpu, config.num_workers)
    with lock_folder(output, runtime):
        bank, queries = (
            open_bank(split, output / "features", extractor, f"{config.model} {sha256}")
            for split in (train, val)
        )
    extracted = time.monotonic()

    rows = [
        {"block": block, "k": search(config, runtime, f"block_{block}", (bank, train), (queries, val), ks)}
        for block in spec.block_ids
    ]

    # ---- results
    results = {
        "task": "knn",
        "encoder": config.model,
        "encoder_sha256": sha256,
        "pretrained_ckp": config.pretrained_ckp,
        "reported_k": min(config.nb_knn[0], len(train)),
        "k": rows[-1]["k"],
        "blocks": rows,
        "counts": {"train": len(train), "val": len(val), "classes": len(train.classes)},
        "input": {"resize": spec.resize, "crop": spec.crop},
        "seconds": {"features": extracted - began, "search": time.monotonic() - extracted},
        "ranks": runtime.world_size,
        "device": runtime.device.type,
        "config": asdict(config),
    }
    if runtime.is_main:
        publish(results, output)
    return results


def choose_features(config: KnnConfig, encoder: nn.Module) -> PooledFeatures:
    """What is computed from each image.

    Raises:
        ValueError: the encoder has no class tokens, or patches larger than the image.
    """
    if config.pool != "patch" and encoder.n_cls_tokens == 0:
        raise ValueError(f"{config.model} has no class tokens: use --pool patch")
    crop = config.input_size // encoder.patch_size * encoder.patch_size
    if crop == 0:
        raise ValueError(
            f"--input_size {config.input_size} is below the patch size, {encoder.patch_size} pixels"
        )
    depth = depth_of(encoder)
    block_ids = tuple(range(depth)) if config.per_block else (depth - 1,)
    return PooledFeatures(config.input_size, crop, config.pool, block_ids)


def search(
    config: KnnConfig,
    runtime: Runtime,
    name: str,
    train: tuple[FeatureStore, LabeledFolder],
    val: tuple[FeatureStore, LabeledFolder],
    ks: Sequence[int],
) -> dict[str, dict[str, float]]:
    """Collective: classify the validation images by one feature; k -> top-1 and top-5 in percent."""
    (bank, labeled), (queries, asked) = train, val
    knn = KNNClassifier(
        ks[-1],
        config.temperature,
        normalize=False,  # they are; once more would round otherwise
        memory_gb=config.memory_gb,
        device=runtime.device,
        progress=runtime.is_main,
    )
    knn.fit(bank.array(name), labeled.labels, len(labeled.classes))
    counts = knn.count_correct(queries.array(name), asked.labels, ks, runtime.rank, runtime.world_size)
    counts = torch.stack(runtime.gather(counts)).sum(0)  # [len(ks), 2]
    shares = (100 * counts.double() / len(asked)).tolist()
    return {str(k): {"top1": top1, "top5": top5} for k, (top1, top5) in zip(ks, shares, strict=True)}


def publish(results: dict[str, Any], output: Path) -> None:
    """Write `results.json`, the plot of the blocks if asked for, and a line for each block; rank 0 alone."""
    write_json(output / "results.json", results)
    rows = results["blocks"]
    if results["config"]["per_block"]:
        draw_blocks(output / "blocks.png", rows, results["reported_k"])
    for row in rows:
        metrics = ", ".join(f"k={k} {v['top1']:.2f}/{v['top5']:.2f}" for k, v in row["k"].items())
        print(f"{output}: block {row['block']}: top-1/top-5 {metrics}", flush=True)


def draw_blocks(path: Path, rows: list[dict[str, Any]], reported_k: int) -> None:
    """Top-1 over the blocks: a line for each k, and a mark at the best block of the reported one."""
    from pixio.images.figures import figure, open_axes

    with figure(path, 6, 3.6) as drawn:
        axes = drawn.subplots()
        for k in rows[0]["k"]:
            axes.plot(
                [row["block"] for row in rows], [row["k"][k]["top1"] for row in rows], ".-", label=f"k = {k}"
            )
        best = max(rows, key=lambda row: row["k"][str(reported_k)]["top1"])
        axes.axvline(best["block"], color="0.7", linewidth=1, zorder=0)
        title = f"k = {reported_k}: block {best['block']} is best, {best['k'][str(reported_k)]['top1']:.1f} %"
        axes.set(xlabel="block (0 = first)", ylabel="k-NN top-1, %", title=title)
        open_axes(axes)
        axes.legend()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse and run; returns what `results.json` holds. A mistake ends the program with one line."""
    config = parse(KnnConfig, argv, prog=PROGRAM)
    return run_evaluation(PROGRAM, config, partial(evaluate, config))


if __name__ == "__main__":
    main()
