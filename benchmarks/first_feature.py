"""Seconds from a fresh Python to the first feature of a B/16 weight file: Pixio beside transformers.

    python benchmarks/first_feature.py --runs 5

Writes one encoder as a released `.pth` and as a folder of transformers, then starts both sides in turn, each
time in a new process, and prints medians. Needs the test dependencies; the files (0.7 GB) are removed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import pixio
from pixio.weights.export import export

STAGES = ("import", "load", "forward", "total")  # total counts the start of the interpreter too
SIDES = {
    "pixio": (
        "import pixio",
        "model = pixio.pixio_vitb16(pretrained={path!r}).eval()",
        "model(images, [-1])",
    ),
    "transformers": (
        "from transformers import AutoModel",
        "model = AutoModel.from_pretrained({path!r}).eval()",
        "model(images)",
    ),
}
PROGRAM = """
import json, time
start = time.perf_counter()
import torch
{0}
imported = time.perf_counter()
{1}
loaded = time.perf_counter()
with torch.inference_mode():
    images = torch.zeros(1, 3, 256, 256)
    {2}
done = time.perf_counter()
print(json.dumps([imported - start, loaded - imported, done - loaded]))
"""


def measure(side: str, path: Path) -> list[float]:
    """Seconds of each stage of one fresh process."""
    program = PROGRAM.format(*(line.format(path=str(path)) for line in SIDES[side]))
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return [*json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - start]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="processes per side, after one to warm the disk")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        paths = {"pixio": Path(folder) / "pixio_vitb16.pth", "transformers": Path(folder) / "transformers"}
        model = pixio.pixio_vitb16()
        torch.save(model.state_dict(), paths["pixio"])
        export(model, paths["transformers"], "transformers")
        rounds = [{side: measure(side, paths[side]) for side in SIDES} for _ in range(runs + 1)][1:]
    medians = {
        side: [statistics.median(stage) for stage in zip(*(times[side] for times in rounds), strict=True)]
        for side in SIDES
    }
    print(f"{'seconds':<14}" + "".join(f"{stage:>9}" for stage in STAGES))
    for side, seconds in medians.items():
        print(f"{side:<14}" + "".join(f"{value:>9.2f}" for value in seconds))
    ratios = (theirs / ours for ours, theirs in zip(medians["pixio"], medians["transformers"], strict=True))
    print(f"{'ratio':<14}" + "".join(f"{ratio:>9.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
