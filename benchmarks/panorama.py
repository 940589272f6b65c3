"""Memory that `pixio predict` takes for a panorama: the peak resident set of its process, by `window_batch`.

    PYTHONPATH=evaluation python benchmarks/panorama.py                   # 16,384 x 4,096 pixels
    … --size 8192 2048 --window_batch 1 16 --pictures

The panorama is noise, the encoder small and random, the head trained for a step; windows have 256 pixels. The
first line is a photograph of one window: what Python, torch and the encoder take.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import eval_monodepth
import numpy as np
import torch
from PIL import Image

import pixio
from pixio.synthetic.trees import write_tree

TRAIN = """
    --dataset folder --max_depth 10 --encoder pixio_vitfemto16 --head linear --crop_size 256 --epochs 1
    --batch_size 1 --batches_per_step 1 --panels 0 --num_workers 0 --device cpu --dtype fp32
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=[16384, 4096], help="width and height, pixels")
    parser.add_argument("--window_batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--pictures", action="store_true", help="also draw pictures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        head = train_head(root)
        for width, height, batches in ((256, 256, [16]), (*options.size, options.window_batch)):
            photo = root / f"{width}x{height}.jpg"
            noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(noise).save(photo)
            for batch in batches:
                output = root / f"{photo.stem}_{batch}"
                command = f"-m pixio predict {photo} --head {head} --output {output} --device cpu"
                command += f" --window_batch {batch}{'' if options.pictures else ' --no_pictures'}"
                print(f"{width} x {height}, window_batch {batch}: {peak(command):.2f} GB", flush=True)


def train_head(root: Path) -> Path:
    """A depth head of one step on a random encoder."""
    torch.save(pixio.pixio_vitfemto16().state_dict(), root / "encoder.pth")
    write_tree("folder", root / "rooms", 1, 1, size=256)
    flags = f"--data_root {root}/rooms --pretrained_ckp {root}/encoder.pth --output_dir {root}/run"
    eval_monodepth.main([*TRAIN.split(), *flags.split()])
    return root / "run/head.pth"


def peak(command: str) -> float:
    """The largest resident set of `python …` in GB of 2^30 bytes."""
    process = subprocess.Popen([sys.executable, *command.split()], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"python {command} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 2**20


if __name__ == "__main__":
    main()
