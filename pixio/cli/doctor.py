"""`pixio doctor`: what this computer offers, what is missing for what, and what to do about it."""

import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pixio.engine.config import option

MIB, GIB = 2**20, 2**30
ENOUGH_SHARED_MEMORY = 2 * GIB  # a few workers' batches of 256-pixel crops
PROBE = 64 * MIB
_REQUIREMENT = re.compile(r"(?P<name>[\w-]+)>=(?P<bound>[\d.]+)(?:\s*;\s*extra == [\"'](?P<extra>\w+)[\"'])?")


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Report versions, devices and what is missing for which part of Pixio; paste it into bug reports."""

    example = "--folder /scratch/runs"
    folder: str = option(".", "folder where runs will write; its speed and free space are measured")

    def run(self) -> None:
        checks = (_versions, _extras, _devices, _decoders, _memory, _slurm, lambda: _disk(self.folder))
        for check in checks:
            for topic, line in check():
                print(f"{topic:<10}{line}")


def _versions() -> list[tuple[str, str]]:
    import torch

    import pixio

    system = f"{platform.system()} {platform.release()} on {platform.machine()}"
    return [
        ("pixio", f"{pixio.__version__} in {Path(pixio.__file__).parent}"),
        ("python", f"{platform.python_version()}, {system}"),
        ("torch", torch.__version__),
    ]


def _extras() -> list[tuple[str, str]]:
    """One line for each extra: complete, or the packages that are missing or too old."""
    lacking: dict[str, list[str]] = {}
    for text in metadata.requires("pixio") or ():
        found = _REQUIREMENT.match(text)
        if found and found["extra"] not in (None, "all"):
            problem = _problem(found["name"], found["bound"])
            lacking.setdefault(found["extra"], []).extend([problem] if problem else [])
    return [
        (f"[{extra}]", f"{', '.join(missing)}: pip install 'pixio[{extra}]'" if missing else "complete")
        for extra, missing in sorted(lacking.items())
    ]


def _problem(name: str, bound: str) -> str:
    """What is wrong with an installed package; empty if nothing is."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is missing"
    return f"{name} {version} is older than {bound}" if _key(version) < _key(bound) else ""


def _key(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _devices() -> list[tuple[str, str]]:
    from pixio.engine.runtime import describe_devices

    return [("device", line) for line in describe_devices()]


def _decoders() -> list[tuple[str, str]]:
    """What decodes JPEGs and PNGs; Pillow always can, several times more slowly."""
    return [
        (kind, "Pillow" if _problem(name, "0") else f"{name} {metadata.version(name)}")
        for kind, name in (("JPEG", "simplejpeg"), ("PNG", "opencv-python"))
    ]


def _memory() -> list[tuple[str, str]]:
    from pixio.data.loader import SHARED_MEMORY

    if not os.path.isdir(SHARED_MEMORY):
        return []
    free = shutil.disk_usage(SHARED_MEMORY).free
    advice = (
        "" if free >= ENOUGH_SHARED_MEMORY else ": little for loading workers (docker run --shm-size=16g)"
    )
    return [(SHARED_MEMORY, f"{free / GIB:.1f} GiB free{advice}")]


def _slurm() -> list[tuple[str, str]]:
    if not shutil.which("sbatch"):
        return [("SLURM", "none (sbatch not found): recipes start with --local or bash")]
    said = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=False)
    problem = "sbatch is here, but " + said.stderr.strip().partition("\n")[0]
    return [("SLURM", problem if said.returncode else said.stdout.strip())]


def _disk(folder: str) -> list[tuple[str, str]]:
    """How fast a file reaches the disk, and what room there is."""
    place = Path(folder).absolute()
    with tempfile.TemporaryFile(dir=place) as file:
        start = time.perf_counter()
        file.write(os.urandom(PROBE))
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    free = shutil.disk_usage(place).free / GIB
    return [("disk", f"{PROBE / MIB / seconds:,.0f} MiB/s written to {place}, {free:,.0f} GiB free")]
