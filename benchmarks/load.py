"""Large numbers of files: time and memory at three sizes, and a kill in the middle; see `faults.py load`.

At scale 1 there are 1,000,000 names to list, 100,000 tiny images in folders, and as many in 5,000 tars. A
folder holds a quarter of the files beside a folder of a quarter, in a folder with the other half: each of
them is a size. Every measurement is a process of its own, forked before anything was read.
"""

import io
import math
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixio.cli.main import main as pixio_command
from pixio.data import Loader, open_stream
from pixio.features import find_images
from pixio.features.extraction import index_shards
from pixio.files import read_json, write_json

NAMES, IMAGES, TARS = 1_000_000, 100_000, 5_000
SHARES = (0.25, 0.5, 1.0)
STEEPEST = 1.25  # exponent of time in the number of files that is a finding; sorting has 1.1, machines waver
GROWTH = 64.0  # MB by which reading four times as many images may grow
SIDE, BATCH = 16, 100
FEATURES = "--model pixio_vitatto8 --size 16 --device cpu --arrays embedding --batch_size 100 --per_file 100"


def place_of(root: Path, share: float) -> Path:
    """The folder that holds this share of the files below `root`."""
    return root / {0.25: "half/quarter", 0.5: "half", 1.0: "."}[share]


def spread(root: Path, files: int, write: Callable[[Path, int], Any], per_folder: int) -> None:
    """Write so many files below `root`; see the head of this file."""
    if (root / "complete").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    for number in range(files):
        share = 0.25 if number < files // 4 else 0.5 if number < files // 2 else 1.0
        folder = place_of(root, share) / f"{number // per_folder:06d}"
        if number % per_folder == 0 or not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
        write(folder, number)
    (root / "complete").touch()


def jpegs() -> list[bytes]:
    """A hundred tiny images."""
    files = []
    for seed in range(100):
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg")
        files.append(buffer.getvalue())
    return files


def write_tar(folder: Path, number: int, images: list[bytes], per_tar: int) -> None:
    with tarfile.open(folder / f"{number:06d}.tar", "w") as tar:
        for each in range(number * per_tar, (number + 1) * per_tar):
            info = tarfile.TarInfo(f"{each:08d}.jpg")
            info.size = len(images[each % len(images)])
            tar.addfile(info, io.BytesIO(images[each % len(images)]))


# ------------------------------------------------------------------------------------------- what is measured
def list_names(root: Path) -> int:
    return sum(len(shard.files.split("\0")) for shard in find_images([str(root)]))  # type: ignore[attr-defined]


def index_tars(root: Path) -> int:
    return sum(part.stop - part.start for part in index_shards(find_images([str(root)]), 1000).parts)


def open_tars(root: Path) -> int:
    """Up to the first batch of a run, which must not read all of them."""
    stream = open_stream("webdataset", str(root), size=SIDE, batch_size=BATCH)
    next(iter(Loader(stream)))
    return len(stream.shards)


def epoch(kind: str) -> Callable[[Path], int]:
    """Read as many images as there are."""

    def read(root: Path) -> int:
        images = sum(1 for _ in root.rglob("*.jpg")) or sum(1 for _ in root.rglob("*.tar")) * IMAGES // TARS
        loader = Loader(open_stream(kind, str(root), size=SIDE, batch_size=BATCH))
        return sum(len(batch["images"]) for batch in islice(loader, images // BATCH))

    return read


def features(root: Path, output: Path) -> int:
    """`pixio features`, into `output`; returns how many images its index names."""
    pixio_command(["features", str(root), *FEATURES.split(), "--output", str(output)])
    return sum(1 for _ in open(output / "index.jsonl"))


def in_child(work: Callable[[], int]) -> Any:
    """Start `work` in a process; its result, seconds of CPU time and MB come through `found`."""
    context = multiprocessing.get_context("fork")
    found = context.Array("d", 3, lock=False)

    def run() -> None:
        os.setsid()
        with open(os.devnull, "w") as quiet:
            os.dup2(quiet.fileno(), 1)
            os.dup2(quiet.fileno(), 2)
        base, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        number = work()
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
        found[:] = [number, time.process_time() - began, memory]

    child = context.Process(target=run)
    child.found = found  # type: ignore[attr-defined]
    child.start()
    return child


def measured(work: Callable[[], int]) -> tuple[int, float, float]:
    """Result, seconds of CPU time, which other programs do not change, and MB of `work`."""
    child = in_child(work)
    child.join()
    if child.exitcode:
        raise RuntimeError(f"a measurement ended with {child.exitcode}")
    number, seconds, memory = child.found
    return int(number), seconds, memory


def killed_features(root: Path, output: Path, images: int) -> dict[str, Any]:
    """Kill `pixio features` when half of its files are there, run it again, and compare with a whole run."""
    shutil.rmtree(output, ignore_errors=True)
    half, whole = output / "killed", output / "whole"
    child = in_child(lambda: features(root, half))
    while child.is_alive() and len(list(half.glob("*.safetensors"))) < images / 100 / 2:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    before = len(list(half.glob("*.safetensors")))
    number, seconds, memory = measured(lambda: features(root, half))
    _, whole_seconds, _ = measured(lambda: features(root, whole))
    different = [
        file.name
        for file in sorted(whole.iterdir())
        if file.is_file() and file.read_bytes() != (half / file.name).read_bytes()
    ]
    left = sorted({file.name for file in half.iterdir()} - {file.name for file in whole.iterdir()})
    row = {"what": f"features, killed after {before} of {len(list(whole.glob('*.safetensors')))} files"}
    row |= {"sizes": [images], "seconds": [seconds], "memory": [memory], "whole_seconds": whole_seconds}
    findings = [f"{name} differs from that of a whole run" for name in different]
    findings += [f"{name} is left" for name in left]
    findings += [] if number == images else [f"features of {number:,} images, {images:,} expected"]
    shutil.rmtree(output)
    return row | {"findings": findings}


def steepness(sizes: list[int], seconds: list[float]) -> float:
    """Exponent of the time in the size, from the smallest to the largest."""
    return math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0])


def load(output: Path, scale: float, untimed: bool = False) -> int:
    """All measurements at this scale; returns the number of findings. Goes on where the last call ended."""
    data, file = output / "load_data", output / "load.json"
    saved = read_json(file) if file.exists() else {}
    rows: dict[str, dict[str, Any]] = saved.get("rows", {}) if saved.get("scale") == scale else {}
    images = jpegs()
    per_tar = IMAGES // TARS
    names, singles = (int(number * scale) // (4 * BATCH) * 4 * BATCH for number in (NAMES, IMAGES))
    tars = singles // per_tar
    if not saved or saved.get("scale") != scale:
        shutil.rmtree(data, ignore_errors=True)
    spread(data / "names", names, lambda folder, number: (folder / f"{number}.jpg").touch(), 1000)
    spread(
        data / "images",
        singles,
        lambda folder, number: (folder / f"{number}.jpg").write_bytes(images[number % len(images)]),
        1000,
    )
    spread(data / "tars", tars, lambda folder, number: write_tar(folder, number, images, per_tar), 100)
    works: dict[str, tuple[str, Callable[[Path], int]]] = {
        "names listed": ("names", list_names),
        "tars indexed": ("tars", index_tars),
        "first batch of tars": ("tars", open_tars),
        "images of folders read": ("images", epoch("folder")),
        "images of tars read": ("tars", epoch("webdataset")),
        "features of images": ("images", lambda root: features(root, output / "features")),
    }
    for what, (kind, work) in works.items():
        if what in rows:
            continue
        found = []
        for share in SHARES:
            shutil.rmtree(output / "features", ignore_errors=True)
            found.append(measured(partial(work, place_of(data / kind, share))))
        rows[what] = judge(what, found, untimed)
        write_json(file, {"scale": scale, "rows": rows})
    if "killed" not in rows:
        rows["killed"] = killed_features(data / "images", output / "features", singles)
        write_json(file, {"scale": scale, "rows": rows})
    shutil.rmtree(data)
    return table(list(rows.values()))


def judge(what: str, found: list[tuple[int, float, float]], untimed: bool) -> dict[str, Any]:
    """A row of the table from what was measured at each size."""
    sizes, seconds, memory = ([each[i] for each in found] for i in range(3))
    exponent = steepness(sizes, seconds)
    findings = [f"time grows with power {exponent:.2f}"] if exponent > STEEPEST and not untimed else []
    if "read" in what or "features" in what:
        growth = memory[-1] - memory[0]
        findings += [f"{growth:.0f} MB more for four times as many"] if growth > GROWTH else []
    row = {"what": what, "sizes": sizes, "seconds": seconds, "memory": memory}
    return row | {"exponent": exponent, "findings": findings}


def table(rows: list[dict[str, Any]]) -> int:
    """Print a row for each measurement; returns the number of findings."""
    print("| what | sizes | CPU seconds | exponent | MB | findings |\n|---|---|---|---|---|---|")
    for row in rows:
        numbers = [", ".join(f"{value:,.4g}" for value in row[key]) for key in ("seconds", "memory")]
        sizes = ", ".join(f"{size:,}" for size in row["sizes"])
        exponent = f"{row['exponent']:.2f}" if "exponent" in row else ""
        text = "; ".join(row["findings"]) or "0"
        print(f"| {row['what']} | {sizes} | {numbers[0]} | {exponent} | {numbers[1]} | {text} |")
    return sum(len(row["findings"]) for row in rows)
