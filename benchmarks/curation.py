"""What self-curation does to a mixed set: rendered scenes, flat graphics and pages of text, a third each.

    OMP_NUM_THREADS=1 python benchmarks/curation.py

1. A small model is pre-trained on everything: the uncurated run, and the model that scores.
2. `curate.py` scores every image with it.
3. The same recipe, for as many steps, on the curated stream (entropy above 4.5, soft sampling by the loss).

Prints the share of each kind that a pass keeps, and the loss of both models on scenes that neither has seen
(computed by `curate.py` too). About five minutes on one CPU core.
"""

import argparse
import io
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixio.files import read_json
from pixio.synthetic.scenes import render

ROOT = Path(__file__).resolve().parents[1] / "pretraining"
SIDE, PER_TAR = 96, 300
RECIPE = shlex.split(
    "--model pixio_vitpico16_enc128x6h4_dec128x2h4 --input_size 64 --mask_grid 2 --batch_size 32 --lr 1e-3"
    " --warmup_epochs 1 --iters_per_epoch 100 --save_freq 0 --num_workers 1 --dtype fp32 --device cpu"
    " --log_freq 100 --dataset_type webdataset"
)


def scene(number: int) -> Image.Image:
    return Image.fromarray(render(number, SIDE).image)


def graphic(number: int) -> Image.Image:
    """A few shapes in plain colors, or a blend of two colors."""
    rng = np.random.default_rng([1, number])
    colors = [tuple(map(int, color)) for color in rng.integers(0, 256, (9, 3))]
    image = Image.new("RGB", (SIDE, SIDE), colors[0])
    if number % 3 == 0:
        ramp = Image.linear_gradient("L").resize((SIDE, SIDE)).rotate(90 * int(rng.integers(4)))
        return Image.composite(Image.new("RGB", (SIDE, SIDE), colors[1]), image, ramp)
    pen = ImageDraw.Draw(image)
    for color in colors[1 : rng.integers(3, 10)]:
        corners = np.sort(rng.integers(0, SIDE, (2, 2)), axis=0).flatten().tolist()
        (pen.rectangle if rng.random() < 0.5 else pen.ellipse)(corners, fill=color)
    return image


def page(number: int) -> Image.Image:
    """Dark letters on light paper."""
    rng = np.random.default_rng([2, number])
    paper, ink = (tuple(map(int, rng.integers(*tones, 3))) for tones in ((215, 256), (0, 80)))
    image = Image.new("RGB", (SIDE, SIDE), paper)
    pen, size = ImageDraw.Draw(image), int(rng.integers(7, 14))
    font = ImageFont.load_default(size)
    for y in range(4, SIDE - size, size + int(rng.integers(2, 5))):
        letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz    "), 40)
        pen.text((4, y), "".join(letters), fill=ink, font=font)
    return image


KINDS = {"scenes": scene, "graphics": graphic, "pages": page}


def write_tars(folder: Path, kinds: list[str], count: int, first: int) -> None:
    """Tars with so many images of each kind, in turn."""
    folder.mkdir(parents=True)
    names = [(kind, number) for number in range(first, first + count) for kind in kinds]
    for start in range(0, len(names), PER_TAR):
        with tarfile.open(folder / f"{start // PER_TAR:04d}.tar", "w") as tar:
            for kind, number in names[start : start + PER_TAR]:
                buffer = io.BytesIO()
                KINDS[kind](number).save(buffer, "JPEG", quality=90)
                info = tarfile.TarInfo(f"{kind}-{number}.jpeg")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)


def run(script: str, *flags: str | Path) -> None:
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True, stdout=subprocess.DEVNULL)


def statistics(folder: Path) -> dict[str, dict]:
    """Records by member name."""
    files = folder.glob("*/*.json")
    return {name: record for file in files for name, record in read_json(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=800, help="training images of each kind")
    parser.add_argument("--epochs", type=int, default=8, help="length of both runs in hundreds of steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tars, stats, held_out = root / "train" / "tars", root / "stats", root / "val" / "scenes"
        write_tars(tars, list(KINDS), options.images, first=0)
        write_tars(held_out, ["scenes"], 300, first=10**6)
        curation = ["--json_path", stats, "--hist_thresh", 4.5, "--soft_sampling"]
        losses = {}
        for run_name, flags in (("uncurated", []), ("curated", curation)):
            output = root / run_name
            epochs = ["--epochs", options.epochs, "--output_dir", output]
            run("main_pretrain.py", *RECIPE, "--data_path", tars, *epochs, *flags)
            checkpoint = output / "checkpoints" / (output / "checkpoints" / "latest").read_text().strip()
            score = ["--checkpoint", checkpoint, "--num_workers", 1, "--device", "cpu"]
            if run_name == "uncurated":
                run("curate.py", "--data_path", tars, "--json_path", stats, *score)
            run("curate.py", "--data_path", held_out, "--json_path", output / "val", *score)
            losses[run_name] = np.mean([image["mae_loss"] for image in statistics(output / "val").values()])

        print(f"{'':10}{'entropy':>9}{'<= 4.5':>8}{'loss':>7}{'kept per pass':>15}")
        for kind in KINDS:
            images = [record for key, record in statistics(stats).items() if key.startswith(kind)]
            entropy, loss = (np.array([r[k] for r in images]) for k in ("histogram_score", "mae_loss"))
            kept = np.mean((entropy > 4.5) * np.minimum(loss, 1))
            print(
                f"{kind:10}{entropy.mean():9.2f}{np.mean(entropy <= 4.5):8.1%}{loss.mean():7.2f}{kept:15.1%}"
            )
        print(f"loss on unseen scenes after {options.epochs * 100} steps: ", end="")
        print(", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))


if __name__ == "__main__":
    main()
