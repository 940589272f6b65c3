"""Segmentation of rendered scenes from few labels: an encoder that was pre-trained against one from scratch.

    PYTHONPATH=pretraining:evaluation python benchmarks/few_labels.py --output runs/few_labels
    … --pretrained encoder.pth           an encoder of one's own instead of one that is pre-trained first

All of the encoder is trained with a linear head, for the same number of steps whatever the number of labels,
with each of the learning rates; the better one counts, for either side. Held-out scenes score it. The table
(mean IoU in percent, mean and standard deviation over the seeds) is printed, and written with the curve as
`few_labels.json` and `few_labels.png`. What is finished is not computed again.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import eval_semseg
import main_pretrain
import numpy as np

import pixio
from pixio.engine.config import option, parse
from pixio.files import write_json
from pixio.images.figures import figure, open_axes
from pixio.synthetic.trees import write_tree
from pixio.synthetic.world import CLASS_NAMES

_TREE = 3  # seed of the tree: scenes that no pre-training of ours has seen, not even without labels
_SIDES = ("pre-trained", "from scratch")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Compare a pre-trained encoder with one from scratch, by the number of labeled images."""

    output: Path = option(Path("runs/few_labels"), "folder of all runs, and of the results")
    labels: tuple[int, ...] = option((20, 80, 320, 800), "numbers of labeled images", ge=1)
    seeds: int = option(3, "runs of each setting", ge=1)
    lr: tuple[float, ...] = option((5e-4, 1.5e-3), "peak learning rates of encoder and head", gt=0)
    steps: int = option(600, "steps of each run, with 16 crops each", ge=1)
    val: int = option(200, "held-out scenes", ge=1)
    size: int = option(64, "side of the scenes in pixels", ge=8)
    encoder: str = option("pixio_vitpico8", "encoder to train")
    pretrained: str | None = option(
        None, "weights of the encoder; none: pre-train it first, on unlabeled scenes"
    )
    pretrain_steps: int = option(1500, "steps of the pre-training, with 64 images each", ge=1)
    pretrain_lr: float = option(1e-3, "peak learning rate of the pre-training; see docs/health.md", gt=0)
    num_workers: int = option(0, "data-loading processes", ge=0)
    device: str = option("auto", "auto, cpu, mps or a GPU")


def write_scenes(config: BenchmarkConfig) -> Path:
    """Labeled scenes in the layout of `--dataset folder`, and a list of the first n for each n."""
    root = config.output / f"scenes_{config.size}"
    write_tree("folder", root, max(config.labels), config.val, config.size, _TREE)
    for n in config.labels:
        lines = [f"train/images/{i:06d}.png train/masks/{i:06d}.png\n" for i in range(n)]
        (root / f"first_{n}.txt").write_text("".join(lines))
    return root


def pretrain(config: BenchmarkConfig) -> str:
    """Pre-train on scenes that are rendered on the way; returns the encoder's file."""
    output = config.output / "pretraining"
    model = next(
        name for name in pixio.list_models(pretraining=True) if name.startswith(f"{config.encoder}_")
    )
    if not (output / "encoder.pth").exists():
        flags = {
            "model": model,
            "dataset_type": "scenes",
            "input_size": config.size,
            "batch_size": 64,
            "epochs": 10,
            "iters_per_epoch": max(config.pretrain_steps // 10, 1),
            "warmup_epochs": 1,
            "lr": config.pretrain_lr,
            "mask_grid": 2,
            "num_workers": config.num_workers,
            "device": config.device,
            "output_dir": output,
        }
        main_pretrain.main([f"--{key}={value}" for key, value in flags.items()])
    return str(output / "encoder.pth")


def run(config: BenchmarkConfig, root: Path, weights: str, n: int, seed: int, lr: float) -> float:
    """Mean IoU in percent, after the last epoch, of one training from `weights` on the first `n` scenes."""
    batch = min(16, n)
    side = "scratch" if weights == "none" else "pretrained"
    flags = {
        "dataset": "folder",
        "data_root": root,
        "nclass": len(CLASS_NAMES),
        "train_split_file": root / f"first_{n}.txt",
        "encoder": config.encoder,
        "pretrained_ckp": weights,
        "head": "linear",
        "train_blocks": "all",
        "layer_decay": 1.0 if weights == "none" else 0.75,
        "lr": lr,
        "encoder_lr": lr,
        "weight_decay": 0.05,
        "batch_size": batch,
        "batches_per_step": 1,
        "epochs": max(config.steps // (n // batch), 1),
        "eval_freq": config.steps,
        "crop_size": config.size,
        "seed": seed,
        "panels": 0,
        "num_workers": config.num_workers,
        "device": config.device,
        "output_dir": config.output / "runs" / f"{side}_{n}_{seed}_{lr:g}",
    }
    return eval_semseg.main([f"--{key}={value}" for key, value in flags.items()])["last"]["miou"]


def markdown(table: dict[str, dict[int, list[float]]]) -> str:
    """Mean and standard deviation over the seeds, a row for each number of labels."""
    lines = ["| labeled images | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    for n in next(iter(table.values())):
        cells = (f"{np.mean(values[n]):.1f} ± {np.std(values[n]):.1f}" for values in table.values())
        lines.append(f"| {n} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, table: dict[str, dict[int, list[float]]]) -> None:
    """Both curves over the number of labels, with the standard deviation over the seeds as bars."""
    with figure(path, 4.5, 3.2) as drawn:
        axes = drawn.subplots()
        for side, points in table.items():
            means, spreads = [np.mean(v) for v in points.values()], [np.std(v) for v in points.values()]
            axes.errorbar(list(points), means, spreads, marker="o", capsize=3, label=side)
        axes.set(xscale="log", xlabel="labeled images", ylabel="mean IoU of held-out scenes, %")
        axes.minorticks_off()  # their labels would lie over those of the points
        axes.set_xticks(list(points), list(map(str, points)))
        open_axes(axes)
        axes.legend()


def main(argv: list[str] | None = None) -> dict[str, dict[int, list[float]]]:
    """Run everything; returns side -> number of labels -> mean IoU of each seed, of the better rate."""
    config = parse(BenchmarkConfig, argv)
    root = write_scenes(config)
    weights = dict(zip(_SIDES, (config.pretrained or pretrain(config), "none"), strict=True))
    table: dict[str, dict[int, list[float]]] = {side: {} for side in _SIDES}
    for n in config.labels:
        for side in _SIDES:
            rates = [
                [run(config, root, weights[side], n, seed, lr) for seed in range(config.seeds)]
                for lr in config.lr
            ]
            table[side][n] = max(rates, key=statistics.mean)
    print(markdown(table))
    write_json(config.output / "few_labels.json", table)
    draw(config.output / "few_labels.png", table)
    return table


if __name__ == "__main__":
    main()
