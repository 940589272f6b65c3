"""One launcher for every training program: `sbatch` through submitit, with requeueing.

A job is a script and its arguments. SLURM warns it with SIGUSR2 before a time limit or a preemption: the
program finishes its step, saves and exits (`pixio.engine.signals`), and the job requeues itself, as it does
where the step never ends. A job that fails is requeued too, if its folder holds a checkpoint, until it has
failed `_FAILURES` times without saving a later one. The next attempt resumes by itself, because its
arguments, and so its output folder, are the same.
"""

import contextlib
import dataclasses
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from pixio.engine.config import option
from pixio.engine.signals import EXIT_PREEMPTED, WARNING, call_if_stuck, defer_signals, received

_PACKAGE = Path(__file__).resolve().parents[1]
_NOT_CODE = ("__pycache__", ".*")
# What the folder of a program may hold beside code; not left out of the package, where `data` is code.
_NOT_PROGRAMS = (*_NOT_CODE, "exp", "runs", "slurm", "data")
_LEFT_BY_SHELLS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
# A warning that comes while Python starts would end the process: block it until the program handles it.
_BLOCK_WARNING = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]); "
_BLOCK_WARNING += "os.execv(sys.argv[1], sys.argv[1:])"
_FAILURES = 3  # after so many in a row without a later step saved, a job is not requeued


@dataclass(frozen=True)
class LaunchConfig:
    """Options of the launcher, in addition to those of the program it starts.

    "none" means the cluster's default, which `SBATCH_PARTITION`, `SBATCH_ACCOUNT`, `SBATCH_QOS` and
    `SBATCH_CONSTRAINT` in the environment set for every job.
    """

    job_dir: str = option(
        "runs/%j", "folder for the logs of all attempts, also the program's --output_dir; %j is the job id"
    )
    job_name: str = option("pixio", "job name")
    ngpus: int = option(8, "GPUs per node, each with its own process", ge=1)
    nodes: int = option(1, "number of nodes", ge=1)
    timeout: int = option(4320, "time limit in minutes; a run that needs longer is requeued", ge=1)
    partition: str | None = option(None, "SLURM partition")
    account: str | None = option(None, "SLURM account")
    qos: str | None = option(None, "SLURM quality of service")
    comment: str | None = option(None, "comment for the scheduler")
    constraint: str | None = option(None, "SLURM constraint: features the nodes must have")
    exclude: str | None = option(None, "nodes to avoid")
    cpus_per_task: int = option(10, "CPU cores per process", ge=1)
    mem_gb: float | None = option(None, "memory per node in GB", gt=0)
    warning: int = option(
        300, "seconds before the time limit at which the run is told to save and exit", ge=1
    )
    slurm: tuple[str, ...] = option((), "any further sbatch options: reservation=big exclusive")
    snapshot: bool = option(False, "run a copy of the code, so that later edits do not affect a queued job")
    local: bool = option(False, "start the processes on this node, without SLURM, and wait for them")
    dry_run: bool = option(False, "print the sbatch script and submit nothing")

    def __post_init__(self) -> None:
        if not self.job_dir:  # the release's way to ask for the default
            object.__setattr__(self, "job_dir", LaunchConfig.job_dir)
        parent = super()
        if hasattr(parent, "__post_init__"):  # of the program
            parent.__post_init__()
        if self.warning >= 60 * self.timeout:
            raise ValueError(
                f"--warning {self.warning} (seconds) must lie within the time limit, --timeout "
                f"{self.timeout} (minutes): choose 1 to {60 * self.timeout - 1}"
            )
        if self.local and self.nodes > 1:
            raise ValueError(f"--local starts processes on one node, not on {self.nodes}: add --nodes 1")


@dataclass(frozen=True)
class Job:
    """What each process of the job runs: a program, as if from the command line."""

    script: str
    arguments: tuple[str, ...]
    grace: float  # seconds after a warning in which the program may finish its step, save and exit

    def __call__(self) -> None:
        requeue: Any = signal.getsignal(WARNING)  # submitit's: it would exit at once, in the middle of a step

        def requeue_anyway() -> None:
            print(f"warned {self.grace:g} s ago and still in the same step: requeued", file=sys.stderr)
            with contextlib.suppress(SystemExit):  # it would end this thread only
                requeue(WARNING, None)
            if submitit.JobEnvironment().global_rank == 0:  # the others end with the job
                os._exit(255)

        with defer_signals(), call_if_stuck(requeue_anyway, self.grace):
            for name in _LEFT_BY_SHELLS:
                os.environ.pop(name, None)  # every attempt has its own rendezvous
            number = submitit.JobEnvironment().job_id
            sys.argv = [self.script, *(word.replace("%j", number) for word in self.arguments)]
            sys.path.insert(0, str(Path(self.script).parent))
            try:
                runpy.run_path(self.script, run_name="__main__")
            except SystemExit as end:
                if end.code != EXIT_PREEMPTED or not received(WARNING):
                    raise
                requeue(WARNING, None)  # rank 0 exits here; the others end as if finished
        signal.signal(WARNING, signal.SIG_IGN)  # a finished run need not be requeued

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues: the same job."""
        return submitit.helpers.DelayedSubmission(self)


class _SlurmExecutor(submitit.SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 1  # so that --dry_run works without SLURM


def launch(config: LaunchConfig, script: Path) -> None:
    """Submit `script`, a training program, or with --local run it; prints where the job is and its log.

    Args:
        config: of a class that inherits from `LaunchConfig` and from the configuration of the program.
        script: the program; it saves below `checkpoints/` in its --output_dir.
    """
    if not config.local and not config.dry_run and not shutil.which("sbatch"):
        sys.exit(
            "error: no SLURM here (sbatch not found): add --local --nodes 1 to run on this node, "
            "or --dry_run to see what would be submitted"
        )
    folder = Path(config.job_dir).absolute()
    setup = []
    if config.snapshot:
        root = submitit.core.utils.JobPaths.get_first_id_independent_folder(folder)
        script = _copy_code(root, script, pretend=config.dry_run)
        path = f"{shlex.quote(str(script.parents[1]))}${{PYTHONPATH:+:$PYTHONPATH}}"
        # PYTHONSAFEPATH (Python 3.11): the copy comes first even where the job starts in the repository
        setup.append(f"export PYTHONSAFEPATH=1 PYTHONPATH={path}")
    arguments = program_arguments(config)
    output = next((word.partition("=")[2] for word in arguments if word.startswith("--output_dir=")), None)
    if output is None:
        output = str(folder)
        arguments += (f"--output_dir={output}",)
    job = Job(str(script.absolute()), arguments, grace=0.8 * config.warning)
    if config.local:
        _run_here(config, folder, setup, job)
        return

    python = shlex.join([sys.executable, "-ISc", _BLOCK_WARNING, sys.executable])
    executor = _SlurmExecutor(folder, max_num_timeout=sys.maxsize, python=python)
    executor.update_parameters(**_sbatch_options(config, setup, Path(output).absolute()))
    if config.dry_run:
        print(executor._make_submission_file_text(executor._submitit_command_str, ""))
        return
    if earlier := _earlier_job(folder):
        sys.exit(
            f"error: job {earlier} already runs in {folder}, and the same command would only resume it: wait "
            "until it ends, scancel it, or choose another --job_dir"
        )
    for name in ("partition", "account", "qos", "constraint"):
        if getattr(config, name) is not None:
            os.environ.pop(f"SBATCH_{name.upper()}", None)  # sbatch would prefer it to the option
    try:
        submitted = executor.submit(job)
    except submitit.core.utils.FailedJobError as error:
        sys.exit(f"error: sbatch refused the job: {' '.join(str(error).split())}")
    print(f"job {submitted.job_id}: log in {submitted.paths.stdout}")


def _earlier_job(folder: Path) -> str:
    """Id and state of a job that was submitted to `folder` and has not ended; empty: there is none."""
    scripts = folder.glob("*_submission.sh")
    submitted = {path.name.partition("_")[0] for path in scripts if "#SBATCH" in path.read_text()}
    command = ["squeue", "--noheader", "--format=%A %T"]
    queue = subprocess.run(command, capture_output=True, text=True, check=False).stdout if submitted else ""
    jobs = dict(line.split() for line in queue.splitlines())
    running = (f"{job} ({jobs[job].lower()})" for job in submitted & jobs.keys() if jobs[job] != "COMPLETING")
    return next(running, "")


def program_arguments(config: LaunchConfig) -> tuple[str, ...]:
    """The command line of the program: its options that differ from their defaults."""
    launcher = {field.name for field in dataclasses.fields(LaunchConfig)}
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in launcher or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no_{field.name}")
        elif isinstance(value, tuple):
            words += [f"--{field.name}", *map(str, value)]
        else:
            words.append(f"--{field.name}={'none' if value is None else value}")
    return tuple(words)


def _sbatch_options(config: LaunchConfig, setup: Sequence[str], output: Path) -> dict[str, Any]:
    """Parameters of submitit's executor, with the shell lines that requeue a failed job."""
    further: dict[str, Any] = {"requeue": True}
    for pair in config.slurm:
        name, equals, value = pair.partition("=")
        further[name.removeprefix("--")] = value if equals else True
    pointer, failures = (
        '"$SLURM_JOB_ID"'.join(map(shlex.quote, str(output / name).split("%j")))
        for name in ("checkpoints/latest", "%j_failures.txt")
    )
    options = {
        "job_name": config.job_name,
        "nodes": config.nodes,
        "ntasks_per_node": config.ngpus,
        "gpus_per_node": config.ngpus,
        "cpus_per_task": config.cpus_per_task,
        "time": config.timeout,
        "mem": config.mem_gb and f"{round(1024 * config.mem_gb)}M",
        "signal_delay_s": config.warning,
        "additional_parameters": further,
        # A lost process would leave the others waiting; newer srun does not inherit the job's cores.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={config.cpus_per_task}"],
        "setup": list(setup),
        "teardown": [
            "status=$?",
            # 75: preempted; 255: has requeued itself
            f"if [[ ! $status =~ ^(0|{EXIT_PREEMPTED}|255)$ ]]; then",
            # the pointer says step_00000100, or step_00000100-1 where that step was saved once more
            f"    name=$(cat {pointer} 2>/dev/null); name=${{name#step_}}; step=$((10#0${{name%%-*}}))",
            f"    echo $step >> {failures}",
            f"    number=$(grep -cx $step {failures})",
            '    echo "failed with status $status, failure ${number:-?} since step $step was saved" >&2',
            f"    if (( step > 0 && number > 0 && number < {_FAILURES} )); then",
            '        echo "requeued" >&2',
            "        exec scontrol requeue $SLURM_JOB_ID",
            "    fi",
            f'    echo "not requeued: nothing saved, {_FAILURES} failures since, or no way to count" >&2',
            "fi",
            "exit $status",
        ],
    }
    names = ("partition", "account", "qos", "comment", "constraint", "exclude")
    options |= {name: getattr(config, name) for name in names}
    return {name: value for name, value in options.items() if value is not None}


def _run_here(config: LaunchConfig, folder: Path, setup: Sequence[str], job: Job) -> None:
    executor = submitit.LocalExecutor(folder, max_num_timeout=sys.maxsize)
    executor.update_parameters(
        tasks_per_node=config.ngpus,
        gpus_per_node=config.ngpus,
        timeout_min=config.timeout,
        signal_delay_s=config.warning,
        setup=list(setup),
    )
    running = executor.submit(job)
    print(f"job {running.job_id}: log in {running.paths.stdout}", flush=True)
    while not running.done():
        time.sleep(0.2)
    for rank in range(config.ngpus):
        task = running.task(rank)
        if not task.paths.result_pickle.exists() or task.exception():
            log = task.stderr() or ""
            sys.exit(f"error: rank {rank} failed; {task.paths.stderr} ends with\n{log[-2000:]}")


def _copy_code(root: Path, script: Path, pretend: bool) -> Path:
    """Copy the package and the folder of `script` below `root`; returns the script among them."""
    if pretend:
        return root / "code" / "COPY" / script.parent.name / script.name
    (root / "code").mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(prefix="", dir=root / "code"))
    for source, left_out in ((_PACKAGE, _NOT_CODE), (script.parent, _NOT_PROGRAMS)):
        shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns(*left_out))
    return copy / script.parent.name / script.name
