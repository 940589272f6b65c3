"""Pixio in minutes on rendered scenes: pre-train it, look at it, distill it, measure what it learned.

    make demo                                    or: python demo.py
    python demo.py --seeds 0 1 2 --update_docs   three runs, into README's tables and the pictures of assets/

Every stage but the last consists of commands that are printed and that you can run yourself; the last is the
probes below. What is done is not done again, so that a second `make demo` resumes. All lies in `runs/demo`.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import pixio
from benchmarks.probes import (
    TEST_SEEDS,
    TRAIN_SEEDS,
    load_split,
    patch_tokens,
    position,
    probe,
    raw_pixels,
)
from pixio.files import read_json, write_json, write_text
from pixio.synthetic.scenes import CLASS_NAMES, render

OUT = Path("runs/demo")
EXPECTED = Path("pretraining/expected_demo.json")  # points of its curves, see `pixio curves --expect`
SIZE, PATCH = 64, 8
PROBE_TRAIN, PROBE_TEST = (TRAIN_SEEDS, 600), (TEST_SEEDS, 300)  # scenes never trained on: first seed, number
MODEL, DECODER, STUDENT = "pixio_vitfemto8", "enc64x4h2_dec64x2h2", "pixio_vitatto8"
COMMON = f"""
    --dataset_type imagenet --data_path {OUT}/tars --input_size {SIZE} --crop_scale_min 0.4 --num_workers 1
    --position_init sincos --batch_size 32 --lr 1e-3 --iters_per_epoch 100 --warmup_epochs 2 --log_freq 20
    --save_steps 0 --save_minutes 1 --save_freq 0
"""
PRETRAIN = f"""
    pretraining/main_pretrain.py --model {MODEL}_{DECODER}
    --norm_pix_loss --mask_ratio 0.75 --mask_grid 2 --epochs 25
    --val_data {OUT}/held_out --val_freq 250 {COMMON}
"""
DISTILL = f"""
    distillation/main_distill.py --teacher_model {MODEL} --student_models {STUDENT} --mask_ratio 0
    --epochs 8 {COMMON} --lr 4e-3 --warmup_epochs 1
"""
TUNE = f"""
    --dataset folder --data_root {OUT}/labeled --encoder {MODEL} --head linear --train_blocks all
    --layer_decay 1 --lr 1e-3 --encoder_lr 1e-3 --epochs 12 --eval_freq 12 --crop_size {SIZE}
    --batch_size 8 --batches_per_step 1 --num_workers 1
"""
MASKS = f"""
    evaluation/eval_semseg.py --nclass {len(CLASS_NAMES)} --class_names {" ".join(CLASS_NAMES)} {TUNE}
"""
DEPTH = f"evaluation/eval_monodepth.py --max_depth 10 {TUNE} --epochs 8 --eval_freq 8"
UNTRAINED = ("raw pixels", "position only", "random encoder")
Rows = dict[str, dict[str, list[float]]]  # features -> metric -> a value for each seed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pre-train a small Pixio on rendered scenes and measure it.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    parser.add_argument(
        "--update_docs", "--update-docs", action="store_true", help="README, assets/, pretraining/"
    )
    options = parser.parse_args(argv)
    OUT.mkdir(parents=True, exist_ok=True)

    step("1. Render scenes: to train on, in ImageNet-style tars, and to hold out")
    tree = f"--size {SIZE} --workers 2"
    run(f"-m pixio scenes imagenet-tars {OUT}/tars --train 2500 --val 0 {tree}")
    run(f"-m pixio scenes imagenet-folders {OUT}/held_out --train 0 --val 200 --seed 1 {tree}")
    run(f"-m pixio scenes folder {OUT}/labeled --train 400 --val 200 --seed 3 {tree}")

    for seed in options.seeds:
        folder = OUT / f"seed{seed}"
        step(f"2. Pre-train a small Pixio, seed {seed}")
        run(f"{PRETRAIN} --seed {seed} --output_dir {folder}/pretrain")
        step(f"3. Distill it into a smaller one, seed {seed}")
        teacher = f"--teacher_pretrained {folder}/pretrain/encoder.pth"
        run(f"{DISTILL} {teacher} --seed {seed} --output_dir {folder}/distill")
        step(f"4. Fine-tune it on 400 labeled scenes, and the same from scratch, seed {seed}")
        for name, start in (("fine-tuned", f"{folder}/pretrain/encoder.pth"), ("scratch", "none")):
            run(f"{MASKS} --pretrained_ckp {start} --seed {seed} --output_dir {folder}/{name}")

    step("5. Fine-tune it for depth, too, and predict depth and masks of rooms never seen")
    first, photos = OUT / f"seed{options.seeds[0]}" / "pretrain", write_photos(2 * SIZE)
    run(f"{DEPTH} --pretrained_ckp {first}/encoder.pth --output_dir {first.parent}/depth")
    whole = f"{write_photos(SIZE)} --mode whole"  # how far things are shows in their size: that of training
    run(f"-m pixio predict {whole} --head {first.parent}/depth/head.pth --output {OUT}/depth")
    run(f"-m pixio predict {photos} --head {first.parent}/fine-tuned/head.pth --output {OUT}/masks")

    step("6. Look at the run, at what it reconstructs, and at its features")
    checkpoint = first / "checkpoints" / (first / "checkpoints/latest").read_text().strip()
    known = f"--expect {EXPECTED}" if EXPECTED.is_file() and not options.update_docs else ""
    known += f" --save_expected {EXPECTED}" if options.update_docs else ""
    run(f"-m pixio curves {first} --output {OUT}/curves.png {known}")
    half = "--mask_ratio 0.5"  # at 0.75 four cells of sixteen are visible: little of the room to go on from
    run(f"-m pixio reconstruct {photos} --checkpoint {checkpoint} {half} --output {OUT}/reconstruction.png")
    flags = f"--pretrained {first}/encoder.pth --size {2 * SIZE}"
    run(f"-m pixio pca {photos} {flags} --smooth --output {OUT}/pca.png")
    run(f"-m pixio explore {photos} {flags} --output {OUT}/explore.html")

    step("7. Probe single patch tokens on scenes that no encoder has seen")
    rows, tuned = probe_all(options.seeds), tuning_results(options.seeds)
    table, verdict = markdown(rows), f"{compare(rows, options.seeds)} {describe(tuned)}"
    write_json(OUT / "tables.json", {"seeds": options.seeds, "probes": rows, "fine-tuning": tuned})
    report = f"{table}\n{verdict} {describe_reconstruction(options.seeds)}\n"
    write_text(OUT / "tables.md", report)
    made = "depth/, masks/, curves.png, reconstruction.png, pca.png, explore.html, tables.md"
    print(f"\n{report}\nIn {OUT}: {made}")
    if options.update_docs:
        replace_section(Path("README.md"), "demo", f"{table}\n{verdict}")
        shutil.copy(OUT / "pca.png", "assets/demo_pca.png")


def step(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def run(command: str) -> None:
    """Run `python …` from the root of the repository and stop at its first failure."""
    words = shlex.split(command)
    print("$ python " + " ".join(words), flush=True)
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        raise SystemExit(f"the demo stopped: this command exited with status {code}")


def write_photos(side: int, count: int = 4, folder: Path = OUT) -> str:
    """Save a few held-out scenes as PNG files; their names, for a command line."""
    from PIL import Image

    folder = folder / f"rooms{side}"
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(render(TEST_SEEDS + i, side).image).save(folder / f"room{i}.png")
    return " ".join(f"{folder}/room{i}.png" for i in range(count))


def probe_all(seeds: list[int]) -> Rows:
    """Probe raw pixels, places and encoders alike: random, pre-trained and distilled ones of each seed."""
    train, test = (load_split(*scenes, SIZE, PATCH) for scenes in (PROBE_TRAIN, PROBE_TEST))
    views = {"raw pixels": [raw_pixels(PATCH)], "position only": [position(PATCH)], "random encoder": []}
    views |= {"pre-trained encoder": [], "distilled student": []}
    for seed in seeds:
        torch.manual_seed(seed)
        folder = OUT / f"seed{seed}"
        student = folder / f"distill/encoder_{STUDENT}.pth"
        start = pixio.create_model(MODEL)
        start.start_from_sincos()  # as the run does
        views["random encoder"].append(patch_tokens(start))
        views["pre-trained encoder"].append(
            patch_tokens(pixio.from_pretrained(folder / "pretrain/encoder.pth"))
        )
        views["distilled student"].append(patch_tokens(pixio.from_pretrained(student)))
    rows = {name: [probe(view, train, test) for view in each] for name, each in views.items()}
    return {name: {m: [one[m] for one in found] for m in found[0]} for name, found in rows.items()}


def tuning_results(seeds: list[int]) -> Rows:
    """Segmentation of held-out scenes by whole networks, from pre-trained and from random weights."""
    rows: Rows = {}
    for name in ("fine-tuned", "scratch"):
        results = [read_json(OUT / f"seed{seed}" / name / "results.json") for seed in seeds]
        rows[name] = {"mIoU": [result["last"]["miou"] for result in results]}
    return rows


# ------------------------------------------------------------------------------------------------ tables


def markdown(rows: Rows) -> str:
    """The rows as a Markdown table: means over the seeds, and in brackets the lowest and highest."""
    metrics = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(metrics)} |", f"|{'---|' * (len(metrics) + 1)}"]
    for name, values in rows.items():
        lines.append(f"| {name} | {' | '.join(cell(metric, values[metric]) for metric in metrics)} |")
    return "\n".join(lines) + "\n"


def cell(metric: str, values: list[float]) -> str:
    """Mean and range of a metric."""
    digits = 3 if metric == "depth R2" else 1
    mean, low, high = (f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low}-{high})" if len(values) > 1 else mean


def describe(tuned: Rows) -> str:
    """The results of fine-tuning in a sentence."""
    fine, scratch = (cell("mIoU", tuned[name]["mIoU"]) for name in ("fine-tuned", "scratch"))
    return f"Fine-tuned on 400 labeled scenes: mIoU {fine}, from scratch {scratch}."


def compare(rows: Rows, seeds: list[int]) -> str:
    """How far the pre-trained encoder leads the best that learned nothing, beside the range over seeds."""
    leads, ratios = [], []
    for metric in ("mIoU", "depth R2"):
        learned = rows["pre-trained encoder"][metric]
        untrained = max(max(rows[name][metric]) for name in UNTRAINED)
        margin = sum(learned) / len(learned) - untrained
        leads.append(f"{cell(metric, [margin])} {metric}")
        spread = max(max(row[metric]) - min(row[metric]) for row in rows.values())
        ratios.append(f"{margin / spread:.1f}" if spread else "?")
    lead = f"Pre-training leads the best untrained baseline by {' and '.join(leads)}"
    if len(seeds) > 1:
        lead += f" ({' and '.join(ratios)} times the range over {len(seeds)} seeds)"
    return f"{lead}."


def describe_reconstruction(seeds: list[int]) -> str:
    """The share of the masked patches of held-out scenes that is explained, mean of the seeds."""
    losses = [held_out_loss(OUT / f"seed{seed}/pretrain/log.jsonl") for seed in seeds]
    share = 100 * (1 - sum(losses) / len(losses))
    return f"The model explains {share:.1f} % of the variance within masked patches of held-out scenes."


def held_out_loss(log: Path) -> float:
    """The last one of a run."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [row["held_out_loss"] for row in rows if "held_out_loss" in row][-1]


def replace_section(path: Path, name: str, text: str) -> None:
    """Put a text between the marks `<!-- NAME -->` and `<!-- /NAME -->` of a file."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    old = path.read_text(encoding="utf-8")
    if not found.search(old):
        raise SystemExit(f"{path} has no section {begin} … {end}")
    write_text(path, found.sub(lambda _: f"{begin}\n{text}\n{end}", old))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nthe demo was interrupted: run the same command to continue") from None
