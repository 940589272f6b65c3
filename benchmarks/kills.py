"""Runs of the training programs that are killed at random points and begun again; see `faults.py kills`.

This process imports what the programs need and forks their processes, which join over TCP as ranks started
by hand do, get real signals, and write to a small tmpfs of a mount namespace of their own. Where mounting is
not allowed a full disk is RLIMIT_FSIZE, and a folder is made read-only by its permissions.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import disks
import main_distill
import main_pretrain
import torch

import pixio
from pixio.engine.checkpoint import Checkpoints, materialize
from pixio.engine.runtime import Runtime
from pixio.engine.signals import EXIT_PREEMPTED, end_workers_with_this_process
from pixio.files import write_json
from pixio.synthetic.trees import write_tree

STEPS, SAVE_STEPS = 24, 6
PATIENCE = 60.0  # seconds within which all processes of a run end, whatever was done to it
DISK = 64  # MiB of the tmpfs
CHECKPOINT = 1 << 20  # bytes, more than one takes with what is exported
TINY = "--input_size 32 --mask_grid 1 --batch_size 2 --num_workers 1 --dtype fp32 --device cpu --lr 1e-3"
TINY += f" --drop_path 0.1 --epochs 2 --iters_per_epoch {STEPS // 2} --warmup_epochs 1 --log_freq 1"
TINY += f" --save_freq 0 --save_steps {SAVE_STEPS} --dataset_type imagenet --data_path {{folder}}/tars"
PROGRAMS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "pretraining": (main_pretrain.main, f"{TINY} --model pixio_vitatto8_enc48x3h2_dec48x1h2"),
    "distillation": (
        main_distill.main,
        f"{TINY} --teacher_model pixio_vitfemto8 --teacher_pretrained {{folder}}/teacher.pth"
        " --student_models pixio_vitatto8 pixio_vitfemto8",
    ),
}
VARIANTS = [
    (program, ranks, parallel)
    for program in PROGRAMS
    for ranks, parallel in ((2, "ddp"), (1, "ddp"), (2, "fsdp"))
]
GRACEFUL = {"SIGTERM": signal.SIGTERM, "SIGUSR2": signal.SIGUSR2, "SIGINT": signal.SIGINT}
DISKS = ("disk full", "read-only folder", "folder removed")
FAULTS = ("SIGKILL to one rank", "SIGKILL to all", *GRACEFUL, "SIGSTOP", *DISKS)


@dataclass(frozen=True)
class Place:
    """Where runs write: `work` is filled and made read-only; `mounted` tells whether it is a tmpfs."""

    folder: Path
    work: Path
    mounted: bool


@dataclass
class Run:
    """The processes of one start of a run.

    Attributes:
        output: its --output_dir.
        said: file that all ranks write stdout and stderr to.
    """

    output: Path
    said: Path
    ranks: list[Any] = field(default_factory=list)

    def signal(self, number: int, ranks: Sequence[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank].pid, number)

    def ended(self) -> bool:
        return not any(rank.is_alive() for rank in self.ranks)

    def wait(self, seconds: float) -> bool:
        """Whether all ranks have ended in time."""
        deadline = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(deadline - time.monotonic(), 0))
        return self.ended()

    def close(self) -> list[str]:
        """Kill what is left of its sessions, and name it: nothing may be but for a moment."""
        deadline = time.monotonic() + 5
        while (left := _members([rank.pid for rank in self.ranks])) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.join()
        return list(left.values())


def _members(sessions: list[int]) -> dict[int, str]:
    """Processes of these sessions that have not ended."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, values = stat.read_text().rpartition(")")
            state, _, _, session = values.split()[:4]
            if int(session) in sessions and state not in "ZX":
                found[int(stat.parent.name)] = f"process {name} ({state})"
    return found


def _be_rank(main: Callable[[Sequence[str]], None], flags: list[str], said: Path) -> None:
    """A forked process: its own session, its own output, then the program."""
    os.setsid()
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir("/")
    main(flags)


def start(place: Place, variant: tuple[str, int, str], output: Path) -> Run:
    """Start all ranks of a run, or start it again."""
    program, ranks, parallel = variant
    main, flags = PROGRAMS[program]
    words = [*flags.format(folder=place.folder).split(), "--output_dir", str(output), "--parallel", parallel]
    if ranks > 1:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        words += ["--world_size", str(ranks), "--dist_url", f"tcp://127.0.0.1:{port}"]
    run, fork = Run(output, place.folder / "said"), multiprocessing.get_context("fork")
    run.said.unlink(missing_ok=True)
    for rank in range(ranks):
        own = [*words, "--local_rank", str(rank)] if ranks > 1 else words
        run.ranks.append(fork.Process(target=_be_rank, args=(main, own, run.said)))
        run.ranks[-1].start()
    return run


# ----------------------------------------------------------------------------------------------- what is left
def rows_of(output: Path) -> dict[int, tuple]:
    """Step -> what the run has logged of it; a last line may be cut off."""
    file, rows = output / "log.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            learned = row.get("students") or {"": row}
            rows[row["step"]] = (
                row["images"],
                *((part["loss"], part["lr"], part["grad_norm"]) for part in learned.values()),
            )
    return rows


def newest(output: Path) -> tuple[int, list[torch.Tensor]]:
    """Step and tensors of the newest checkpoint, all of it read; step 0 where there is none.

    Raises:
        ValueError: it is damaged.
    """
    state = Checkpoints(output / "checkpoints", Runtime(torch.device("cpu"))).load_latest()
    if state is None:
        return 0, []
    whole = materialize(state)
    return whole["step"], list(_tensors(whole.get("model") or whole["students"]))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def names_in(folder: Path) -> set[str]:
    """All files below a folder, checkpoints numbered from the newest: after a stop they lie elsewhere."""
    newest_first = sorted(folder.glob("checkpoints/step_*"), reverse=True)
    numbers = {path.name: f"{number}" for number, path in enumerate(newest_first)}
    paths = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    return {"/".join(numbers.get(part, part) for part in path.parts) for path in paths}


# ------------------------------------------------------------------------------------------------ faults
def strike(fault: str, run: Run, place: Place, rng: random.Random) -> tuple[str, Callable[[], None]]:
    """Do it now; returns to whom, and what undoes it once the run has ended."""
    everyone = list(range(len(run.ranks)))
    some = rng.choice([everyone, [rng.choice(everyone)]])
    if fault.startswith("SIGKILL"):
        some = everyone if fault.endswith("all") else [rng.choice(everyone)]
        run.signal(signal.SIGKILL, some)
    elif fault in GRACEFUL:
        run.signal(GRACEFUL[fault], some)
    elif fault == "SIGSTOP":
        run.signal(signal.SIGSTOP, some)
        time.sleep(rng.uniform(0.1, 1.5))
        run.signal(signal.SIGCONT, some)
    elif fault == "disk full":
        left = rng.randrange(CHECKPOINT)
        if place.mounted:
            return "", disks.fill(place.work, left)
        disks.limit_files([rank.pid for rank in run.ranks], left)
        return "", lambda: None  # the limit ends with the processes
    else:
        folder = rng.choice([run.output, run.output / "checkpoints"])
        folder = folder if folder.exists() else place.work
        if fault == "folder removed":
            if folder != place.work:
                shutil.rmtree(folder, ignore_errors=True)
            return folder.name, lambda: None
        return folder.name, disks.refuse(folder, place.mounted)
    return "all" if some == everyone else f"rank {some[0]}", lambda: None


@contextlib.contextmanager
def places(base: Path | None = None) -> Iterator[Place]:
    """Data, a teacher, and a small disk of this process's own, where it may mount one."""
    with TemporaryDirectory(prefix="kills-", dir=base) as made:
        folder = Path(made).resolve()
        work = folder / "work"
        work.mkdir()
        write_tree("imagenet-tars", folder / "tars", 24, 0, size=32, per_tar=8)
        torch.manual_seed(0)
        torch.save(pixio.pixio_vitfemto8(img_size=32).state_dict(), folder / "teacher.pth")
        with disks.small_disk(work, DISK) as mounted:
            yield Place(folder, work, mounted)


# ----------------------------------------------------------------------------------------------- the campaign
@dataclass(frozen=True)
class Reference:
    """An undisturbed run: its rows, last tensors, files, and how long it took."""

    rows: dict[int, tuple]
    tensors: list[torch.Tensor]
    names: set[str]
    seconds: float


def undisturbed(place: Place, variant: tuple[str, int, str]) -> Reference:
    """Run it to its end."""
    output, began = place.work / "undisturbed", time.monotonic()
    run = start(place, variant, output)
    run.wait(10 * PATIENCE)
    seconds = time.monotonic() - began
    wrong = run.close() or finish_wrong(run)
    if wrong:
        raise SystemExit(f"the undisturbed run of {variant} fails: {wrong}\n{run.said.read_text()}")
    step, tensors = newest(output)
    assert step == STEPS, step
    reference = Reference(rows_of(output), tensors, names_in(output), seconds)
    shutil.rmtree(output)
    return reference


def finish_wrong(run: Run) -> str | None:
    """What is wrong with the end of a run that nobody disturbed."""
    if any(codes := [rank.exitcode for rank in run.ranks]):
        return f"ended with {codes}: {last_line(run.said)}"
    return None


def last_line(said: Path) -> str:
    lines = said.read_text(errors="replace").strip().splitlines() if said.exists() else []
    return lines[-1][-200:] if lines else "nothing said"


def kill(place: Place, run: Run, fault: str, rng: random.Random, seconds: float) -> dict[str, Any]:
    """Strike a run at a random point, let it end, and look at what is left."""
    while_saving, delay = rng.random() < 0.5, rng.uniform(0, seconds)
    began = time.monotonic()
    saves, wanted = 0, rng.randrange(1, STEPS // SAVE_STEPS)
    while not run.ended() and time.monotonic() - began < (PATIENCE if while_saving else delay):
        if while_saving:
            saving = any((run.output / "checkpoints").glob(".step_*.tmp"))
            saves += saving
            if saving and saves >= wanted:
                time.sleep(rng.uniform(0, 0.02))
                break
        time.sleep(0.0005 if while_saving else 0.005)
    try:
        whom, undo = strike(fault, run, place, rng)
    except BaseException:
        run.close()
        raise
    struck = time.monotonic()
    found: dict[str, Any] = {"fault": fault, "whom": whom, "what": []}
    if not run.wait(PATIENCE):
        found["what"].append(f"no end within {PATIENCE:g} s of the fault")
    found["seconds"] = time.monotonic() - struck
    found["what"] += [f"{each} is left" for each in run.close()]
    found["what"] += [f"{path} is left" for path in _shared_memory(place)]
    undo()
    codes = found["codes"] = [rank.exitcode for rank in run.ranks]
    reached = max(rows_of(run.output), default=0)
    try:
        step, _ = newest(run.output)
    except ValueError as error:
        found["what"].append(f"the newest checkpoint cannot be read: {error}"[:300])
        return found
    found |= {"reached": reached, "saved": step, "said": last_line(run.said)}
    if fault != "folder removed":
        found["lost"] = reached - step
        bound = 0 if set(codes) <= {0, EXIT_PREEMPTED} else 2 * SAVE_STEPS - 1
        if found["lost"] > bound:
            found["what"].append(f"{found['lost']} steps lost, {bound} may be: {codes}")
    if fault in DISKS and "Traceback" in run.said.read_text(errors="replace"):
        found["what"].append("a traceback in place of a message")
    return found


def _shared_memory(place: Place) -> list[str]:
    """What is left in the shared memory that only this campaign sees."""
    return [str(path) for path in Path("/dev/shm").iterdir()] if place.mounted else []


def run_and_kill(
    place: Place, variant: tuple[str, int, str], reference: Reference, faults: list[str], number: int
) -> list[dict[str, Any]]:
    """One run: each fault strikes one start of it, then it runs to its end."""
    rng, output = random.Random(f"kills {number}"), place.work / "run"
    shutil.rmtree(output, ignore_errors=True)
    found = [kill(place, start(place, variant, output), fault, rng, reference.seconds) for fault in faults]
    last, wrong = start(place, variant, output), []
    if not last.wait(PATIENCE):
        wrong.append(f"the resumed run does not end within {PATIENCE:g} s")
    wrong += [f"{each} is left by the resumed run" for each in last.close()]
    wrong += (
        [f"the resumed run {what}"] if (what := finish_wrong(last)) else _compare(output, reference, faults)
    )
    found[-1]["what"] += wrong
    shutil.rmtree(output, ignore_errors=True)
    return [{"run": number, "variant": list(variant), **row} for row in found]


def _compare(output: Path, reference: Reference, faults: list[str]) -> list[str]:
    """How a run differs from the undisturbed one."""
    wrong, rows = [], rows_of(output)
    differing = [step for step, row in rows.items() if row != reference.rows[step]]
    missing = [step for step in reference.rows if step not in rows]
    if differing:
        wrong.append(f"other losses at steps {differing}")
    if missing and not set(faults) & set(DISKS):  # a log that cannot be written ends no run
        wrong.append(f"no losses of steps {missing}")
    step, tensors = newest(output)
    if step != STEPS or not all(map(torch.equal, tensors, reference.tensors)):
        wrong.append(f"other weights at step {step}")
    if extra := names_in(output) - reference.names:
        wrong.append(f"left: {sorted(extra)}")
    return wrong


def kills(output: Path, kills: int, only: list[str]) -> int:
    """So many kills, two for each run; returns the number of findings. Goes on where the last call ended."""
    record = output / "kills.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    if unknown := set(only) - set(FAULTS):
        raise SystemExit(f"no such fault: {', '.join(unknown)}; choose from {', '.join(FAULTS)}")
    faults = [fault for fault in FAULTS if not only or fault in only]
    references: dict[tuple[str, int, str], Reference] = {}
    torch.set_num_threads(1)
    end_workers_with_this_process()  # the runs, too, where the campaign itself is killed
    with places() as place, open(record, "a") as file:
        if "read-only folder" in faults and not place.mounted and os.geteuid() == 0:
            faults.remove("read-only folder")
            print("not tried: a read-only folder (root may write anywhere, and cannot mount here)")
            if not faults:
                return 0
        while len(rows) < kills:
            number = len(rows) // 2
            variant = VARIANTS[number % len(VARIANTS)]
            if variant not in references:
                references[variant] = undisturbed(place, variant)
            rng = random.Random(f"faults {number}")
            chosen = [faults[(2 * number) % len(faults)], rng.choice(faults)]
            began = time.monotonic()
            new = run_and_kill(place, variant, references[variant], chosen, number)
            new[-1]["run_seconds"] = time.monotonic() - began
            rows += new
            file.writelines(json.dumps(row) + "\n" for row in new)
            file.flush()
            for row in new:
                for what in row["what"]:
                    print(f"run {number}, {variant}, {row['fault']}: {what}", file=sys.stderr, flush=True)
    return table(rows, output / "kills.json", place.mounted)


def table(rows: list[dict[str, Any]], file: Path, mounted: bool) -> int:
    """Print and write a row for each fault; returns the number of findings."""
    print("| fault | kills | findings | steps lost, at most | until all had ended, at most |")
    print("|---|---|---|---|---|")
    faults: list[dict[str, Any]] = []
    for fault in FAULTS:
        its = [row for row in rows if row["fault"] == fault]
        if not its:
            continue
        what = [text for row in its for text in row["what"]]
        lost, slowest = max(row.get("lost", 0) for row in its), max(row["seconds"] for row in its)
        found = {"fault": fault, "kills": len(its), "findings": len(what), "lost": lost, "slowest": slowest}
        faults.append({**found, "kinds": what})
        shown = "all" if fault == "folder removed" else lost  # what was in it
        print(f"| {fault} | {len(its)} | {len(what)} | {shown} | {slowest:.1f} s |")
    write_json(file, {"faults": faults, "disk": "tmpfs" if mounted else "RLIMIT_FSIZE"})
    return sum(row["findings"] for row in faults)
