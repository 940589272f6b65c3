"""The paper's three changes to MAE at a scale that a laptop reaches: decoder depth, mask cells, class tokens.

    export PYTHONPATH=.:pretraining
    python benchmarks/ablation.py                 # says what it costs here, then runs; resumes
    python benchmarks/ablation.py --cost_only
    python benchmarks/ablation.py --update_docs   # also writes docs/ablation.md and its figure

From MAE's setting (a shallow decoder, single patches masked, one class token) to Pixio's, one change at a
time and together, on rendered scenes: encoder, steps, batch, learning rate and masking ratio are the same
everywhere, three seeds each. Every run is `pretraining/main_pretrain.py`; the probes are those of the demo.
"""

import argparse
import json
import math
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import main_pretrain
import torch

import pixio
from benchmarks.probes import TEST_SEEDS, TRAIN_SEEDS, load_split, patch_tokens, probe
from pixio.files import read_json, write_json, write_text
from pixio.images.figures import figure, open_axes
from pixio.images.normalization import normalize
from pixio.models.registry import mae_builder
from pixio.synthetic.trees import write_tree

ENCODER, SHAPE, SIZE, PATCH = pixio.pixio_vitfemto8, "enc64x4h2", 64, 8
METRICS = ("mIoU", "depth R2", "held-out loss")


@dataclass(frozen=True)
class Setting:
    """One row: decoder blocks, side of a masked cell in patches, class tokens."""

    name: str
    decoder: int = 1
    cell: int = 1
    tokens: int = 1

    @property
    def model(self) -> str:
        """The name of its pre-training model, which is made known."""
        name = f"{ENCODER.__name__}_{SHAPE}_dec64x{self.decoder}h2"
        if name not in pixio.list_models(pretraining=True):
            mae_builder(name, ENCODER)
        return name


SETTINGS = (
    Setting("MAE"),
    Setting("+ decoder", decoder=4),
    Setting("+ cells", cell=2),
    Setting("+ class tokens", tokens=8),
    Setting("+ decoder, cells", decoder=4, cell=2),
    Setting("Pixio: all three", decoder=4, cell=2, tokens=8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=2500, help="rendered scenes to train on")
    parser.add_argument("--held_out", type=int, default=256, help="rendered scenes for the held-out loss")
    parser.add_argument("--probe_scenes", type=int, nargs=2, default=[600, 300], help="to fit on, to test on")
    parser.add_argument("--num_workers", type=int, default=1, help="data-loading processes")
    parser.add_argument("--cost_only", action="store_true", help="print the estimated cost and stop")
    parser.add_argument(
        "--update_docs", action="store_true", help="write docs/ablation.md, assets/ablation.png"
    )
    options = parser.parse_args()
    print(describe_cost(options), flush=True)
    if options.cost_only:
        return
    for folder, layout, train, val, seed in (
        ("tars", "imagenet-tars", options.images, 0, 0),
        ("held_out", "imagenet-folders", 0, options.held_out, 1),
    ):
        write_tree(layout, options.output / folder, train, val, SIZE, seed)
    fit, test = (
        load_split(first, count, SIZE, PATCH)
        for first, count in zip((TRAIN_SEEDS, TEST_SEEDS), options.probe_scenes, strict=True)
    )
    results = {
        setting.name: [measure(setting, seed, options, fit, test) for seed in options.seeds]
        for setting in SETTINGS
    }
    write_json(options.output / "results.json", results)
    text, verdict = markdown(results), compare(results)
    print(f"\n{text}\n{verdict}")
    if options.update_docs:
        write_page(options, table=text, verdict=verdict)
        draw(results, Path("assets/ablation.png"))


def measure(setting: Setting, seed: int, options: argparse.Namespace, fit: dict, test: dict) -> dict:
    """Train one setting with one seed, or go on with it, and probe it; done once."""
    folder = options.output / f"{SETTINGS.index(setting)}_seed{seed}"
    if (folder / "probes.json").is_file():
        return read_json(folder / "probes.json")
    train(setting, seed, options, options.steps, folder)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = probe(patch_tokens(pixio.from_pretrained(folder / "encoder.pth")), fit, test)
    result["held-out loss"] = rows[-1]["held_out_loss"]
    result["variance"] = rows[-1]["health"]["variance"]
    write_json(folder / "probes.json", result)
    return result


def train(setting: Setting, seed: int, options: argparse.Namespace, steps: int, folder: Path) -> None:
    """Run `main_pretrain.py`, which resumes by itself."""
    warmup = steps // 10
    command = f"""
        --model {setting.model} --n_cls_tokens {setting.tokens} --mask_grid {setting.cell} --mask_ratio 0.75
        --position_init sincos
        --dataset_type imagenet --data_path {options.output}/tars --input_size {SIZE} --crop_scale_min 0.4
        --batch_size {options.batch_size} --lr {options.lr} --epochs {steps} --iters_per_epoch 1
        --warmup_epochs {warmup} --seed {seed} --save_freq 0 --save_steps 0 --save_minutes 2
        --num_workers {options.num_workers} --val_data {options.output}/held_out --output_dir {folder}
    """
    main_pretrain.main(shlex.split(command))


def describe_cost(options: argparse.Namespace, timed: int = 4) -> str:
    """Seconds per step of every setting, measured on rendered images in memory, and what all runs take."""
    lines, total = [], 0.0
    images = torch.randint(0, 256, (options.batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
    for setting in SETTINGS:
        mae = pixio.create_model(
            setting.model, img_size=SIZE, n_cls_tokens=setting.tokens, mask_grid=setting.cell
        )
        seconds = []
        for _ in range(timed + 1):
            start = time.perf_counter()
            mae(normalize(images)).loss.backward()
            seconds.append(time.perf_counter() - start)
        step = statistics.median(seconds[1:])
        total += step * options.steps * len(options.seeds)
        lines.append(f"{setting.name:<18} {step:6.3f} s per step")
    runs = f"{len(SETTINGS)} settings x {len(options.seeds)} seeds x {options.steps} steps"
    return "\n".join([*lines, f"{runs}: about {total / 3600:.1f} hours on this machine as it is now"])


def markdown(results: dict[str, list[dict]]) -> str:
    """Mean and standard deviation over the seeds."""
    lines = [
        "| setting | decoder blocks | mask cell | class tokens | mIoU | depth R2 | held-out loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        cells = [setting.name, setting.decoder, f"{setting.cell} x {setting.cell}", setting.tokens]
        for metric in METRICS:
            values, digits = [row[metric] for row in results[setting.name]], 1 if metric == "mIoU" else 3
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def compare(results: dict[str, list[dict]]) -> str:
    """How far the probes of the last setting are from those of the first, and how far seeds move that."""
    parts = []
    for metric, digits in (("mIoU", 1), ("depth R2", 3)):
        first, last = ([row[metric] for row in results[SETTINGS[i].name]] for i in (0, -1))
        spread = math.hypot(*(statistics.stdev(each) if len(each) > 1 else 0.0 for each in (first, last)))
        difference = statistics.mean(last) - statistics.mean(first)
        parts.append(f"{difference:+.{digits}f} {metric} (standard deviation {spread:.{digits}f})")
    return f"From MAE's setting to Pixio's: {', '.join(parts)}."


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """A panel per metric: every seed a dot, their mean a line."""
    with figure(path, 7, 2.6) as drawn:
        axes = drawn.subplots(1, len(METRICS), sharey=True)
        for axis, metric in zip(axes, METRICS, strict=True):
            for height, setting in enumerate(reversed(SETTINGS)):
                values = [row[metric] for row in results[setting.name]]
                axis.plot(values, [height] * len(values), "o", markersize=4, alpha=0.6, color="C0")
                axis.plot([statistics.mean(values)] * 2, [height - 0.3, height + 0.3], color="C1")
            axis.set(xlabel=metric)
        axes[0].set_yticks(range(len(SETTINGS)), [setting.name for setting in reversed(SETTINGS)])
        open_axes(*axes)


PAGE = """# The three changes at a laptop's scale

`PYTHONPATH=.:pretraining python benchmarks/ablation.py --steps {steps} --update_docs` wrote this page:
{seeds} seeds of {batch_size} images a step, lr {lr:g}, an encoder of 64 x 4 on {images} rendered scenes of
64 pixels. Mean ± standard deviation over the seeds; probes as in the demo. Losses of settings with different
cells are not comparable: larger cells hide more.

{table}
![Probes and held-out loss of six settings: a dot for each seed, a line for the mean](../assets/ablation.png)

{verdict}

What it says: which change moves which probe by more than the seeds do, for this encoder, these images and
this length. What it does not say: how the changes act at the paper's scale, where encoders are a thousand
times larger and see far more images.
"""


def write_page(options: argparse.Namespace, **texts: str) -> None:
    """docs/ablation.md, from what was run."""
    values = vars(options) | {"seeds": len(options.seeds)}
    write_text("docs/ablation.md", PAGE.format(**values, **texts))


if __name__ == "__main__":
    main()
