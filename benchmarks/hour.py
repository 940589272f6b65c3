"""What an hour of pre-training gives: the rows of the demo, heads on the frozen encoder, few labels.

    export PYTHONPATH=.:pretraining:evaluation
    python benchmarks/hour.py pretraining/runs/pixio_vitpico8_cpu                 # resumes
    python benchmarks/hour.py pretraining/runs/pixio_vitpico8_cpu --update_docs   # also docs/hour.md

For a finished run of `pretraining/scripts/pretrain_pixio_vitpico8_cpu.sh`, beside an encoder that starts as
that did and learned nothing. All lies in `RUN/measured`.
"""

import argparse
import shutil
from pathlib import Path

import torch

import pixio
from benchmarks import few_labels
from benchmarks.probes import TEST_SEEDS, TRAIN_SEEDS, load_split, patch_tokens, position, probe, raw_pixels
from demo import Rows, markdown, run, write_photos
from pixio.cli.drawing import save_sheet
from pixio.dense import Predictor
from pixio.files import read_json, write_json, write_text
from pixio.images.inference import read_image
from pixio.images.normalization import to_tensor
from pixio.synthetic.scenes import CLASS_NAMES

ENCODER, SIZE, PATCH = "pixio_vitpico8", 64, 8
FINE = 2 * SIZE  # side of the rooms for heads and pictures: twice as many patches as in pre-training
HEADS = {"linear": "--head linear --lr 1e-3", "dpt": "--head dpt --dpt_width 32 --lr 5e-4"}
TASKS = {  # metric -> what trains the head whose results.json holds it
    "abs_rel": "evaluation/eval_monodepth.py --max_depth 10",
    "miou": f"evaluation/eval_semseg.py --nclass {len(CLASS_NAMES)} --class_names {' '.join(CLASS_NAMES)}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="output folder of the finished run")
    parser.add_argument("--output", type=Path, help="folder of all results; by default RUN/measured")
    parser.add_argument("--probe_scenes", type=int, nargs=2, default=[600, 300], help="to fit on, to test on")
    parser.add_argument("--scenes", type=int, nargs=2, default=[400, 200], help="for the heads: train, test")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of the heads")
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 80, 320, 800])
    parser.add_argument("--seeds", type=int, default=3, help="runs per number of labels")
    parser.add_argument("--steps", type=int, default=600, help="steps of each fine-tuning")
    parser.add_argument("--update_docs", action="store_true", help="docs/hour.md, assets/, pretraining/")
    options = parser.parse_args()
    options.output = options.output or options.run / "measured"
    options.output.mkdir(parents=True, exist_ok=True)
    encoder, untrained = options.run / "encoder.pth", options.output / "untrained.pth"
    torch.manual_seed(0)
    start = pixio.create_model(ENCODER)
    start.start_from_sincos()  # as the run did
    torch.save(start.state_dict(), untrained)

    rows = probe_all(options, untrained, encoder)
    encoders = {"random": untrained, "pre-trained": encoder}
    heads = {
        f"{name} encoder, {head}": train_heads(options, name, file, head)
        for head in HEADS
        for name, file in encoders.items()
    }
    print(probes := markdown(rows))
    print(protocol := describe_heads(heads))
    flags = {"output": options.output / "few_labels", "pretrained": encoder, "encoder": ENCODER}
    flags |= {"seeds": options.seeds, "steps": options.steps, "lr": 1e-3}
    words = [f"--{key}={value}" for key, value in flags.items()]
    tuned = few_labels.markdown(few_labels.main([*words, "--labels", *map(str, options.labels)]))
    draw(options, encoder)
    if options.update_docs:
        update_docs(options, probes=probes, protocol=protocol, tuned=tuned)


def probe_all(options: argparse.Namespace, untrained: Path, encoder: Path) -> Rows:
    """The rows of the demo's table, computed once."""
    done = options.output / "probes.json"
    if not done.is_file():
        train, test = (
            load_split(first, count, SIZE, PATCH)
            for first, count in zip((TRAIN_SEEDS, TEST_SEEDS), options.probe_scenes, strict=True)
        )
        views = {
            "raw pixels": raw_pixels(PATCH),
            "position only": position(PATCH),
            "random encoder": patch_tokens(pixio.from_pretrained(untrained)),
            "pre-trained encoder": patch_tokens(pixio.from_pretrained(encoder)),
        }
        found = {name: probe(view, train, test) for name, view in views.items()}
        write_json(done, {name: {m: [value] for m, value in row.items()} for name, row in found.items()})
    return read_json(done)


def train_heads(options: argparse.Namespace, name: str, file: Path, head: str) -> dict[str, float]:
    """A head for depth and one for masks on a frozen encoder: metric -> value of the last epoch."""
    train, test = options.scenes
    root = options.output / "labeled"
    run(f"-m pixio scenes folder {root} --train {train} --val {test} --seed 3 --size {FINE}")
    found = {}
    for metric, program in TASKS.items():
        output = options.output / f"{name}_{head}_{metric}"
        run(
            f"{program} --dataset folder --data_root {root} --encoder {ENCODER} --pretrained_ckp {file}"
            f" {HEADS[head]} --crop_size {FINE} --batch_size 8 --batches_per_step 1"
            f" --epochs {options.epochs} --eval_freq {options.epochs} --num_workers 0 --output_dir {output}"
        )
        found[metric] = read_json(output / "results.json")["last"][metric]
    return found


def describe_heads(heads: dict[str, dict[str, float]]) -> str:
    """Markdown table of the heads."""
    lines = ["| frozen encoder, head | depth, abs. rel. error | masks, mIoU |", "|---|---|---|"]
    lines += [f"| {name} | {found['abs_rel']:.3f} | {found['miou']:.1f} |" for name, found in heads.items()]
    return "\n".join(lines) + "\n"


def draw(options: argparse.Namespace, encoder: Path) -> None:
    """Curves and reconstructions of the run, and what its DPT heads predict."""
    photos = write_photos(FINE, folder=options.output)
    latest = options.run / "checkpoints" / (options.run / "checkpoints/latest").read_text().strip()
    run(f"-m pixio curves {options.run} --output {options.output}/curves.png")
    run(
        f"-m pixio reconstruct {photos} --checkpoint {latest} --mask_ratio 0.5"
        f" --output {options.output}/reconstruction.png"
    )
    heads = (options.output / f"pre-trained_dpt_{metric}/head.pth" for metric in TASKS)
    depth, classes = (Predictor.from_pretrained(head, encoder, mode="whole") for head in heads)
    colors = torch.tensor(classes.class_colors, dtype=torch.uint8)  # [K, 3]
    panels = {
        "image": [to_tensor(read_image(photo)) for photo in photos.split()],
        "depth": [depth(photo) for photo in photos.split()],
        "classes": [colors[classes(photo).long()].permute(2, 0, 1) for photo in photos.split()],
    }
    save_sheet(panels, options.output / "dense.png", scale="m")


PAGE = """# An hour on a laptop

`PYTHONPATH=.:pretraining:evaluation python benchmarks/hour.py RUN {flags} --update_docs`
wrote this page from a run of `pretraining/scripts/pretrain_pixio_vitpico8_cpu.sh`, seed 0. Ridge probes of
patches, as in the demo:

{probes}
Heads on the frozen encoder by `evaluation/`, `{HEADS[linear]}` and `{HEADS[dpt]}`, on
{scenes[0]} rendered rooms of {FINE} pixels, {epochs} epochs of batch 8, measured on {scenes[1]} others:

{protocol}
![Depth and classes that the DPT heads predict for rooms never seen](../assets/hour_dense.png)

Mean IoU of the whole network trained on few labeled rooms of 64 pixels, {steps} steps of 16 crops at
lr 1e-3, mean ± standard deviation over {seeds} seeds:

{tuned}
![mean IoU over the number of labels](../assets/hour_few_labels.png)

![Half of each room is masked, and what the model predicts pasted in](../assets/hour_reconstruction.png)

`pixio curves RUN --expect pretraining/expected_hour.json` compares a run of yours.
"""


def update_docs(options: argparse.Namespace, **tables: str) -> None:
    """docs/hour.md, its pictures, and the points of the curves."""
    labels = " ".join(map(str, options.labels))
    flags = f"--scenes {options.scenes[0]} {options.scenes[1]} --epochs {options.epochs}"
    flags += f" --steps {options.steps} --seeds {options.seeds} --labels {labels}"
    write_text("docs/hour.md", PAGE.format(**vars(options), FINE=FINE, HEADS=HEADS, flags=flags, **tables))
    for name in ("few_labels/few_labels", "reconstruction", "dense"):
        shutil.copy(options.output / f"{name}.png", f"assets/hour_{Path(name).name}.png")
    run(
        f"-m pixio curves {options.run} --output {options.output}/curves.png"
        " --save_expected pretraining/expected_hour.json"
    )


if __name__ == "__main__":
    main()
