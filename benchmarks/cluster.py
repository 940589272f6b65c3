"""Jobs of the published scripts on a local SLURM, disturbed at random; see `faults.py cluster`.

A round is one script: an undisturbed job, then a queue of jobs on two nodes or in a partition that others
push out, which are preempted, run into their limits, are requeued, lose their node or a rank. The data comes
through `pipe:` commands that wait, so that a tiny run lasts as long as its disturbances need.
"""

import contextlib
import json
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from kills import rows_of
from local_slurm import LocalSlurm, available
from test_cluster import PUBLISHED, ROOT, Jobs, said

import pixio
from pixio.files import write_json
from pixio.synthetic.trees import write_tree

SCRIPTS = ("imagenet", "distilled", "distilled_small")
PER_ROUND = 10  # disturbances
PAUSE = 1.0  # seconds until a tar of 8 images is there
STEPS = 80
LENGTH = f"--epochs 2 --iters_per_epoch {STEPS // 2} --save_steps 5 --timeout 60 --warning 60 --drop_path 0.1"
WHERE = ("--nodes 2 --ngpus 1", "--nodes 1 --ngpus 2 --partition low")
EVENTS = ("preemption", "time limit", "requeue", "node drain", "node down", "rank death")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE")
PATIENCE = 300.0  # seconds for a disturbed job to start again, and for all to end


class Round:
    """The jobs of one script on one cluster."""

    def __init__(self, jobs: Jobs, script: str, folder: Path, rng: random.Random) -> None:
        self.jobs, self.cluster, self.rng = jobs, jobs.cluster, rng
        self.script, self.flags = PUBLISHED[script]
        tars = sorted((folder / "tars").glob("*.tar"))
        pipes = "::".join(f"pipe:sleep {PAUSE}; cat {tar}" for tar in tars)
        self.environ = {"IMAGENET_TARS": pipes, "TEACHER": str(folder / "teacher.pth")}
        self.seen: dict[str, int] = {}  # step at which a job was disturbed last

    def submit(self, name: str, where: str) -> None:
        words = shlex.split(f"{LENGTH} {self.flags} {where}")
        self.jobs.submit(name, *words, command=["bash", ROOT / self.script], **self.environ)

    def step(self, name: str) -> int:
        return max(rows_of(self.jobs.folder / name), default=0)

    def show(self, name: str, field: str) -> str:
        shown = self.cluster.call("scontrol", "show", "job", self.jobs.numbers[name])
        found = re.search(rf"\b{field}=(\S+)", shown)
        return found[1] if found else ""

    def state(self, name: str) -> str:
        return self.cluster.state(self.jobs.numbers[name])

    def ready(self) -> list[str]:
        """Jobs that run, have saved since they were disturbed, and are not about to end."""
        running = [name for name in self.jobs.numbers if self.state(name) == "RUNNING"]
        return [name for name in running if self.seen.get(name, 0) + 8 <= self.step(name) < STEPS - 10]

    def disturb(self, name: str, event: str) -> dict[str, Any] | None:
        """Do it, and wait until the job has started again; None where it ended before."""
        number, restarts = self.jobs.numbers[name], self.show(name, "Restarts")
        node, reached = self.show(name, "BatchHost"), self.step(name)
        hit = [name] if event in ("time limit", "requeue", "rank death") else self.jobs.numbers
        if event == "preemption":
            wrap = "--wrap=sleep 1"
            self.cluster.call("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", wrap)
        elif event == "time limit":
            minutes = int(self.show(name, "RunTime").split(":")[1]) + 1
            self.cluster.call("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")
        elif event == "requeue":
            self.cluster.call("scontrol", "requeue", number)
        elif event == "rank death":
            with contextlib.suppress(AssertionError):  # it has just ended
                self.jobs.kill_rank(name, self.rng.randrange(2))
        else:
            state = "DRAIN" if event == "node drain" else "DOWN"
            self.cluster.call("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=campaign")
            if event == "node drain":
                self.cluster.call("scontrol", "requeue", number)
            # on a node that is back before the last process of a job has left, SLURM would hold that job
            time.sleep(self.rng.uniform(12, 16))
            self.cluster.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.cluster.wait(
            lambda: self.show(name, "Restarts") != restarts or self.state(name) in ENDED,
            f"{name} after {event}",
            PATIENCE,
        )
        self.seen |= {each: self.step(each) for each in hit}  # until it logs more, it has only begun again
        if event == "time limit":
            with contextlib.suppress(Exception):  # it may have ended
                self.cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=60")
        again = self.show(name, "Restarts") != restarts
        return (
            {"event": event, "job": name, "step": reached} if again or self.state(name) == "FAILED" else None
        )

    def findings(self, name: str, expected: dict[int, tuple]) -> list[str]:
        """What is wrong with a job that has ended."""
        folder = self.jobs.folder / name
        rows, state = rows_of(folder), self.state(name)
        log = said(folder, {"number": self.jobs.numbers[name]}).strip()[-300:]
        wrong = [] if state == "COMPLETED" else [f"{state} at step {max(rows, default=0)}: {log}"]
        if state == "COMPLETED" and rows != expected:
            wrong.append(
                f"other losses at steps {[step for step in expected if rows.get(step) != expected[step]]}"
            )
        left = [path.name for path in folder.rglob(".*.tmp")]
        return wrong + ([f"left: {left}"] if left and state == "COMPLETED" else [])


def one_round(number: int, script: str, folder: Path) -> dict[str, Any]:
    """Submit, disturb, wait, compare."""
    rng = random.Random(f"cluster {number}")
    with LocalSlurm(port=23000 + 10 * (os.getpid() % 100)) as cluster:
        here = Round(Jobs(cluster, folder), script, folder, rng)
        here.submit("whole", WHERE[0])
        cluster.wait(lambda: here.state("whole") in ENDED, "the undisturbed job", PATIENCE)
        expected = rows_of(folder / "whole")
        assert (here.state("whole"), len(expected)) == ("COMPLETED", STEPS)
        events: list[dict[str, Any]] = []
        names: list[str] = []
        until = time.monotonic() + PATIENCE
        while len(events) < PER_ROUND or any(here.state(name) not in ENDED for name in names):
            if time.monotonic() > until:
                break  # what has not ended is a finding
            alive = [name for name in names if here.state(name) not in ENDED]
            if len(events) < PER_ROUND and len(alive) < 2:
                names.append(f"job{len(names)}")
                here.submit(names[-1], WHERE[len(names) % 2])
            if len(events) < PER_ROUND and (ready := [name for name in here.ready() if name in names]):
                name = rng.choice(ready)
                low = here.show(name, "Partition") == "low"
                event = rng.choice([each for each in EVENTS if low or each != "preemption"])
                if done := here.disturb(name, event):
                    events.append(done)
                    until = time.monotonic() + PATIENCE
                    print(f"round {number}, {script}: {done}", file=sys.stderr, flush=True)
            time.sleep(rng.uniform(0.5, 2))
        what = {name: here.findings(name, expected) for name in names}
        restarts = sum(int(here.show(name, "Restarts")) for name in names)
    return {"round": number, "script": script, "events": events, "jobs": what, "restarts": restarts}


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """A folder with data and a teacher."""
    with TemporaryDirectory(prefix="cluster-") as made:
        folder = Path(made).resolve()
        write_tree("imagenet-tars", folder / "tars", 64, 0, size=32, per_tar=8)
        torch.manual_seed(0)
        torch.save(pixio.pixio_vitpico16(img_size=32).state_dict(), folder / "teacher.pth")
        yield folder


def cluster(output: Path, events: int) -> int:
    """Rounds until there were so many disturbances, from where the last call ended; returns the findings."""
    if not available():
        raise SystemExit("no SLURM here (apt-get install slurm-wlm munge, as root)")
    record = output / "cluster.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    while sum(len(row["events"]) for row in rows) < events:
        with prepared() as folder:
            rows.append(one_round(len(rows), SCRIPTS[len(rows) % len(SCRIPTS)], folder))
        with open(record, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        if not rows[-1]["events"]:
            break  # nothing could be disturbed: another round would not end either
    print("| script | jobs | disturbances | starts | findings |\n|---|---|---|---|---|")
    table = []
    for script in SCRIPTS:
        its = [row for row in rows if row["script"] == script]
        jobs = sum(len(row["jobs"]) for row in its)
        what = [f"{name}: {text}" for row in its for name, texts in row["jobs"].items() for text in texts]
        kinds = [event["event"] for row in its for event in row["events"]]
        counts = {kind: kinds.count(kind) for kind in EVENTS}
        starts = jobs + sum(row["restarts"] for row in its)
        table.append({"script": script, "jobs": jobs, "events": counts, "starts": starts, "findings": what})
        shown = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        print(
            f"| {script} | {jobs} | {shown} | {starts} | {len(what)} |"
            + "".join(f"\n    {text}" for text in what)
        )
    write_json(output / "cluster.json", {"scripts": table})
    return sum(len(row["findings"]) for row in table)
