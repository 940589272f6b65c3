"""A campaign of faults: nothing may be lost, executed or half written.

    export OMP_NUM_THREADS=1 PYTHONPATH=evaluation:pretraining:distillation
    python benchmarks/faults.py hostile --inputs 10000 --output runs/faults
    python benchmarks/faults.py kills --kills 200 --output runs/faults
    python benchmarks/faults.py load --scale 1 --output runs/faults
    PYTHONPATH=$PYTHONPATH:tests python benchmarks/faults.py cluster --events 50 --output runs/faults

`hostile` damages the files of every reader of foreign bytes. Each input must give a result or an exception
that the reader documents, within SECONDS, with at most `Reader.memory` more than before, execute nothing and
write nothing outside of its folder. `kills` kills training runs at random points and begins them again
(kills.py), `load` reads large numbers of files (load.py), and `cluster` disturbs jobs on a SLURM of its own
(cluster.py).

Each prints a table and writes it, as JSON, into --output, beside what failed; begun again it goes on where it
was. The exit status is 1 where something was found.
"""

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hostile import READERS, Reader, damaged
from weight_seeds import MARKER

from pixio.files import read_json, write_json

SECONDS = 10.0  # for one input
ROOT = Path(__file__).resolve().parents[1]
_EVENTS = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "shutil.rmtree",
)
_NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect")


class Watch:
    """Notes what the process does that no reader may: it starts programs, connects, or writes outside."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.on = str(folder), list[str](), False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (
                (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if mode is None
                else set("wax+") & set(mode)
            )
            if not writes or not isinstance(path, (str, bytes, os.PathLike)):
                return
        elif event not in _EVENTS + _NEVER:
            return
        places = [
            os.path.abspath(os.fsdecode(part))
            for part in arguments[:2]
            if isinstance(part, (str, bytes, os.PathLike))
        ]
        inside = event not in _NEVER and all(
            place.startswith(self.folder) for place in places[: 1 if event == "open" else 2]
        )
        if not inside and places[:1] != ["/dev/null"]:
            self.seen.append(f"{event} {places}")


def _short_of_memory(error: BaseException | None) -> str | None:
    """What failed for want of memory, also where it was turned into a documented error."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        parser = bool(frames) and frames[-1].filename == ast.__file__  # says so of too many brackets
        if (isinstance(error, MemoryError) and not parser) or re.search("alloc", str(error)):
            return f"{type(error).__name__} {error}"[:160]
        error = error.__cause__ or error.__context__
    return None


def attempt(reader: Reader, seed: dict[str, bytes], folder: Path, watch: Watch) -> str | None:
    """Give a reader one input; returns what is wrong with what it did, else None."""
    for file in folder.iterdir():
        if file.is_file() and file.name not in seed:
            file.unlink()
    for name, data in seed.items():
        (folder / name).write_bytes(data)
    watch.on = True
    try:
        reader.read(folder)
    except reader.refuses as error:
        if hidden := _short_of_memory(error):
            return f"asked for too much memory: {hidden}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if f"{ROOT}/" in frame.filename and "/.venv/" not in frame.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:160]}"
    finally:
        watch.on = False
    if (folder / MARKER).exists() or watch.seen:
        found, watch.seen = watch.seen, []
        return f"executed or written outside: {found}"
    return None


def run_inputs(
    reader: Reader, seeds: list[dict[str, bytes]], name: str, start: int, stop: int, progress: Any, file: Path
) -> None:
    """A child: inputs `start` to before `stop`; appends findings to `file`, a line each."""
    sys.dont_write_bytecode = True
    with TemporaryDirectory() as made:
        folder = Path(made).resolve()
        os.chdir(folder)
        watch = Watch(folder)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + reader.memory, size + reader.memory))
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with open(file, "a") as findings, open(os.devnull, "w") as quiet:
            os.dup2(quiet.fileno(), 1)  # what readers tell users
            os.dup2(quiet.fileno(), 2)
            for number in range(start, stop):
                seed = damaged(reader, seeds, number, name)
                begin = time.perf_counter()
                progress[0] = number
                wrong = attempt(reader, seed, folder, watch)
                progress[1] = max(progress[1], time.perf_counter() - begin)
                progress[2] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
                if wrong:
                    findings.write(json.dumps({"number": number, "what": wrong}) + "\n")
                    findings.flush()
    progress[0] = stop


def watch_over(reader: Reader, name: str, start: int, stop: int, file: Path) -> dict[str, float]:
    """Run inputs in children; one that dies or hangs is a finding, and the next goes on behind it."""
    slowest = memory = 0.0
    began = time.perf_counter()
    context, seeds = multiprocessing.get_context("fork"), reader.seeds()
    while start < stop:
        progress = context.Array("d", [start, 0, 0], lock=False)
        child = context.Process(target=run_inputs, args=(reader, seeds, name, start, stop, progress, file))
        child.start()
        at, since = start, time.monotonic()
        while child.is_alive():
            child.join(0.2)
            if progress[0] != at:
                at, since = progress[0], time.monotonic()
            elif time.monotonic() - since > SECONDS:
                child.kill()
                child.join()
        slowest, memory = max(slowest, progress[1]), max(memory, progress[2])
        start = int(progress[0])
        if start < stop:
            hung = child.exitcode == -signal.SIGKILL
            what = f"no end within {SECONDS:g} s" if hung else f"the process died ({child.exitcode})"
            with open(file, "a") as findings:
                findings.write(json.dumps({"number": start, "what": what}) + "\n")
            start += 1
    return {"seconds": time.perf_counter() - began, "slowest": slowest, "memory": memory}


def guide(name: str, start: int, stop: int, file: Path) -> dict[str, float]:
    """As `watch_over`, by a fuzzer that looks for inputs which reach new code; see guided.py."""
    began, script = time.perf_counter(), Path(__file__).with_name("guided.py")
    folder = file.with_suffix(".corpus")
    folder.mkdir(exist_ok=True)
    command = [sys.executable, script, name, str(stop - start), folder, file]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if ended.returncode:  # it names the input that it died of, and has left it in `folder`
        if "No module named 'atheris'" in ended.stderr:
            raise SystemExit("--guided needs atheris: pip install atheris")
        with open(file, "a") as findings:
            what = f"the process died ({ended.returncode}): {ended.stderr.strip()[-300:]}"
            findings.write(json.dumps({"number": start, "what": what}) + "\n")
    measured = folder / "measured.json"
    found = read_json(measured) if measured.exists() else {"slowest": SECONDS, "memory": 0.0}
    return {"seconds": time.perf_counter() - began, **found}


def hostile(output: Path, inputs: int, only: list[str], guided: bool = False) -> int:
    """Inputs of all readers, or of those named `only`; prints and writes a row for each; returns findings."""
    total = 0
    for name, reader in READERS.items():
        if only and name not in only:
            continue
        file = output / f"{name.replace(' ', '_')}{'_guided' if guided else ''}.json"
        findings = file.with_suffix(".findings")
        row = read_json(file) if file.exists() else {"reader": name, "inputs": 0, "seconds": 0.0}
        wanted = -(-inputs // 10) if reader.slow else inputs
        while row["inputs"] < wanted:
            stop = min(row["inputs"] + 5_000, wanted)
            ran = (guide if guided else partial(watch_over, reader))(name, row["inputs"], stop, findings)
            row |= {"inputs": stop, "seconds": row["seconds"] + ran.pop("seconds")}
            row |= {key: max(row.get(key, 0.0), value) for key, value in ran.items()}
            lines = findings.read_text().splitlines() if findings.exists() else []
            row["findings"] = len(lines)
            kinds: dict[str, list[int]] = {}
            for line in map(json.loads, lines):
                kinds.setdefault(line["what"].partition(": ")[0], []).append(line["number"])
            row["kinds"] = {what: numbers[:3] for what, numbers in kinds.items()}
            write_json(file, row)
        total += row["findings"]
        print(
            f"| {name} | {row['inputs']:,} | {row['findings']} | {row['slowest']:.2f} s | "
            f"{row['memory']:.0f} MB | "
            f"{row['seconds']:.0f} s |"
            + "".join(f"\n    {what} {numbers}" for what, numbers in row["kinds"].items()),
            flush=True,
        )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, default=Path("runs/faults"))
    options = parts.add_parser("hostile", parents=[shared])
    options.add_argument("--inputs", type=int, default=10_000, help="per reader; slow ones get a tenth")
    options.add_argument("--only", nargs="*", default=[], choices=list(READERS), help="only these readers")
    options.add_argument("--guided", action="store_true", help="coverage-guided, with atheris")
    options = parts.add_parser("kills", parents=[shared])
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--only", nargs="*", default=[], help="only these faults")
    options = parts.add_parser("load", parents=[shared])
    options.add_argument("--scale", type=float, default=1.0, help="1: 1,000,000 names, 100,000 images")
    options.add_argument("--untimed", action="store_true", help="do not judge times, at small scales")
    options = parts.add_parser("cluster", parents=[shared])
    options.add_argument("--events", type=int, default=50, help="disturbances, in rounds of ten")
    given = vars(parser.parse_args())
    part, output = given.pop("part"), given.pop("output").resolve()
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if part == "hostile":
        found = hostile(output, **given)
    else:
        found = getattr(importlib.import_module(part), part)(output, **given)
    raise SystemExit(min(found, 1))


if __name__ == "__main__":
    main()
