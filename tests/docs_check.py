"""Run the documentation: every command and every Python block of the pages, in order, as a reader would.

`make docs-check` runs all pages, `python tests/docs_check.py docs/data.md …` some. Each page has a fresh copy
of the repository for itself and one shell that starts at its root, as does a `cd` into one of the trees.
What pages name (photo.jpg, photos/, tars, weight files, a trained head) lies there, rendered or tiny and
random. `BINDINGS` replaces what must be another word here, `SHORTER` cuts long runs by flags behind the
command, and `NOT_RUN` says what is left out, and why. A page with commands takes one to two minutes of CPU
time (README 91 s, data.md 80 s), evaluation.md with its eleven runs more. `tests/test_docs.py` checks in
seconds that every command is known and that its flags exist.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TREES = ("pretraining", "evaluation", "distillation")
ENCODER, MAE = "pixio_vitfemto16", "pixio_vitfemto16_enc64x4h2_dec64x1h2"
DATA = {  # layout of rendered scenes -> folder in data/
    "nyuv2": "nyud",
    "kitti": "kitti",
    "ade20k": "ade20k",
    "pascal": "pascal",
    "loveda": "loveda",
    "imagenet-folders": "imagenet",
}

TRAIN = "--device cpu --dtype fp32 --num_workers 1 --epochs 1 --iters_per_epoch 2 --warmup_epochs 0"
TRAIN += " --batch_size 2 --accum_iter 1 --log_freq 1"
DENSE = "--epochs 1 --batch_size 1 --batches_per_step 1 --crop_size 64 --panels 0"
CLASSIFY = "--epochs 1 --warmup_epochs 0 --batch_size 2 --input_size 64"
KNN = "--input_size 64 --nb_knn 2"
SMALL = "--device cpu --dtype fp32 --num_workers 0"

NOT_RUN = {  # pattern of a command -> why it is not run
    r"^pip install": "it would change the environment; tests/test_packaging.py checks the extras",
    r"^make ": "the targets of continuous integration, minutes each",
    r"^hf auth login": "asks for a token",
    r"^python demo\.py": "what `make demo` runs, minutes",
    r"\bbenchmarks/": "measures for minutes; docs/benchmarks.md has commands and figures",
}
BINDINGS = {  # pattern -> what stands for it here, in this order
    r"^cd (?=pretraining|evaluation|distillation)": "cd ~/",
    r"=…": "=tars",
    r"/data/(imagenet-1k-wds|tars)\b": "tars",
    r"^pixio convert … ": "pixio convert pixio_vith16.pth hf_folder ",
    r"(eval_(?!knn)\w+\.py .*) …$": rf"\1 --encoder {ENCODER} --pretrained_ckp pixio_vith16.pth",
    r" …$": "",
    r"\bSOURCES…": "photos",
    r"\bPHOTOS…": "a.png b.png",
    r"\b(FILE|SOURCE)\b": "pixio_vith16.pth",
    r"\bTARGET --to FORMAT": "converted.pth --to pth",
    r"--output DIR\b": "--output written",
    r"--data_root DIR\b": "--data_root data/labeled",
    r"eval_classify\.py --data_path DIR\b": "eval_classify.py --data_path data/imagenet",
    r"\bDIR\b": "photos",
    r"--encoder pixio_vitb16\b": f"--encoder {ENCODER}",
    r"\bRUN\b": "runs/made",
    r"step_00100000": "step_00000002",
    r"facebook/pixio-vith16": "pixio_vith16.pth",
    r"\[7, 15, 23, 31\]": "[0, 1, 2, 3]",
    r'device="cuda", dtype="bf16"': 'device="cpu", dtype="fp32"',
    r"((?:launch_\w+|run_all)\.sh .*)\bpixio_vith16 ": rf"\1{ENCODER} ",
    r"--train_blocks 8": "--train_blocks 1",
    r"\bheld_out\b": "photos",
}
SHORTER = {  # pattern -> flags put behind; the first that fits
    r"scripts/\S*(imagenet|webdata|ablation)\.sh": "--dry_run",  # SLURM
    r"scripts/distill_\S*onegpu\.sh|main_distill\.py": (
        f"{TRAIN} --teacher_model {ENCODER} --student_models {ENCODER}"
    ),
    r"vitpico8_cpu\.sh$": f"--data_path tars {TRAIN} --model {MAE}",  # else it renders 20,000 scenes first
    r"scripts/pretrain_\S*(cpu|onegpu)\.sh|main_pretrain\.py (?!--help)": f"{TRAIN} --model {MAE}",
    r"launch_(monodepth|semseg)\.sh|eval_(monodepth|semseg)\.py": f"{DENSE} {SMALL}",
    r"launch_knn\.sh|eval_knn\.py": f"{KNN} {SMALL}",
    r"launch_classify\.sh|eval_classify\.py": f"{CLASSIFY} {SMALL}",
    r"curate\.py --": "--device cpu --num_workers 1",
}
PYTHON_START = """\
import numpy as np
from PIL import Image
image = Image.open("a.png")
array = np.asarray(image)
"""
SHIMS = {  # programs that stand before all others on the PATH
    # SLURM itself: tests/test_cluster.py
    "sbatch": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec bash "$@"\n',
}
_SNIPPET = re.compile(
    r"^```(?P<language>\w*)\n(?P<block>.*?)^```$"
    r"|`(?P<inline>(?:(?:PYTHONPATH=\S+ )?python|pixio \w+|torchrun|bash|sbatch|make|pip|hf) [^`\n]+)`",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """One command, or one Python block, as the page has it."""

    page: Path
    line: int
    text: str
    python: bool = False

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def left_out(self) -> str | None:
        """Why it is not run; None if it is."""
        return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, self.text)), None)

    @property
    def bound(self) -> str:
        """What is run, every placeholder replaced, before it is cut short."""
        text = self.text
        for pattern, value in BINDINGS.items():
            text = re.sub(pattern, value, text)
        return text

    @property
    def short(self) -> str:
        """What is run."""
        text = self.bound
        if self.python:
            return PYTHON_START + text
        flags = next((flags for pattern, flags in SHORTER.items() if re.search(pattern, text)), "")
        if "run_all.sh" in text:
            return f'DENSE_FLAGS="{DENSE} {SMALL}" KNN_FLAGS="{KNN} {SMALL}" {text}'
        return f"{text} {flags}".strip()


def snippets_of(page: Path) -> list[Snippet]:
    """The commands and Python blocks of a page, in its order; comments are left out."""
    text = page.read_text()
    found = []
    for match in _SNIPPET.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["inline"]:
            found.append(Snippet(page, line, match["inline"]))
        elif match["language"] == "python":
            found.append(Snippet(page, line + 1, match["block"], python=True))
        elif match["language"] == "bash":
            joined = re.sub(r"\\\n\s*", lambda gap: "\0", match["block"])  # one command over several lines
            for command in joined.splitlines():
                line += 1
                words = re.sub(r"(^|\s+)#\s.*$", "", command).replace("\0", "")
                if words.strip():
                    found.append(Snippet(page, line, words.strip()))
                line += command.count("\0")
    return found


def copy_repository(folder: Path) -> dict[str, str]:
    """Copy the repository, as it is now, to `folder`; the environment in which a reader stands there."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
    copy = ["xargs", "-0", "cp", "--parents", "--target-directory", str(folder)]
    subprocess.run(copy, cwd=ROOT, input=names, check=True)
    (folder / "shims").mkdir()
    for name, script in SHIMS.items():
        (folder / "shims" / name).write_text(script)
        (folder / "shims" / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder / 'shims'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def write_things(folder: Path) -> None:
    """Write photos, tars, data sets, weights, a head and a checkpoint: what the pages name."""
    import numpy as np
    import torch
    from PIL import Image

    import pixio
    from pixio.synthetic.scenes import render
    from pixio.synthetic.trees import write_tree

    names = "photos/1.png photos/2.jpg photos/3.png frames/one/1.jpg photo.jpg a.jpg b.jpg c.jpg a.png b.png"
    for seed, name in enumerate(names.split()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(seed, 384).image).save(folder / name)
    torch.manual_seed(0)
    weights = getattr(pixio, ENCODER)().state_dict()
    for size in ("b", "l", "h", "1b", "5b"):
        torch.save(weights, folder / f"pixio_vit{size}16.pth")
    write_tree("imagenet-tars", folder / "tars", 12, 0, 384)
    for layout, name in DATA.items():
        write_tree(layout, folder / "data" / name, 8, 8, 64)
    for split, seeds in {"train": range(4), "val": range(4, 6)}.items():
        for seed in seeds:
            scene, own = render(seed, 64), folder / "data/labeled" / split
            targets = {"images": scene.image, "masks": scene.semantics % 5}
            for kind, pixels in targets.items():
                (own / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype("uint8")).save(own / kind / f"{seed}.png")
            (own / "depth").mkdir(exist_ok=True)
            np.save(own / "depth" / f"{seed}.npy", scene.depth.astype("float32"))
    programs = {
        "evaluation/semseg/util/process_loveda.py": "data/loveda",
        "evaluation/eval_monodepth.py": f"--config {ROOT}/evaluation/monodepth/configs/nyuv2_linear.yaml"
        f" --data_root data/nyud --encoder {ENCODER} --pretrained_ckp pixio_vith16.pth"
        f" --output_dir runs/nyuv2 {DENSE} {SMALL}",
        "pretraining/main_pretrain.py": f"--data_path tars --output_dir runs/made {TRAIN} --model {MAE}",
    }
    for program, flags in programs.items():
        subprocess.run([sys.executable, ROOT / program, *flags.split()], cwd=folder, check=True)
    (folder / "head.pth").symlink_to("runs/nyuv2/head.pth")


def run_page(page: Path, things: Path, folder: Path) -> list[str]:
    """Run a page in a fresh copy of the repository; the places that failed."""
    environment = copy_repository(folder)
    for place in ("", *TREES):
        subprocess.run(["cp", "-r", f"{things}/.", folder / place], check=True)
    state, failed = folder / ".state", []
    state.write_text(f"cd {shlex.quote(str(folder))}\n")
    for snippet in snippets_of(page):
        if snippet.left_out:
            print(f"  not run  {snippet.place}  {snippet.text}  ({snippet.left_out})", flush=True)
            continue
        command = snippet.short
        if snippet.python:
            (folder / ".block.py").write_text(command)
            command = f"python {shlex.quote(str(folder / '.block.py'))}"
        script = f"source {state}\n{command}\nstatus=$?\n"
        script += f"(export -p; printf 'cd %q\\n' \"$PWD\") >{state}\nexit $status\n"
        start = time.monotonic()
        ran = subprocess.run(
            ["bash", "-c", script],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        shown = "python block" if snippet.python else snippet.short
        word = "FAILED " if ran.returncode else "ok     "
        print(f"  {word}  {snippet.place}  {shown}  ({time.monotonic() - start:.0f} s)", flush=True)
        if ran.returncode:
            failed.append(snippet.place)
            print("    " + "\n    ".join(ran.stdout.splitlines()[-25:]), flush=True)
    return failed


def main(arguments: list[str]) -> None:
    pages = [Path(name).resolve() for name in arguments] or PAGES
    failed = []
    with tempfile.TemporaryDirectory(prefix="docs-") as name:
        things = Path(name, "things")
        things.mkdir()
        write_things(things)
        for page in pages:
            print(page.relative_to(ROOT), flush=True)
            folder = Path(name, page.stem)
            folder.mkdir()
            failed += run_page(page, things, folder)
    print(f"{len(failed)} failed: {' '.join(failed)}" if failed else "all commands ran")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
