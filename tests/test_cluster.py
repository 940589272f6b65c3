"""Clusters: what the launcher asks for, what a signal does, and jobs on a real SLURM that are cut short."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from local_slurm import LocalSlurm, available
from PIL import Image

import pixio
from pixio.engine.ranks import find_ranks
from pixio.engine.signals import call_if_stuck
from pixio.synthetic.trees import write_tree

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
MODEL = "pixio_vitpico16_enc128x6h4_dec128x2h4"
TINY = f"--model {MODEL} --input_size 32 --mask_grid 1 --batch_size 2 --dtype fp32 --lr 1e-3 --device cpu"
TINY += " --num_workers 1 --warmup_epochs 1 --log_freq 1 --save_freq 0"
KNN = "--input_size 32 --device cpu --num_workers 0 --nb_knn 5"
DENSE = "--epochs 1 --batch_size 1 --batches_per_step 2 --crop_size 64 --panels 0 --device cpu --dtype fp32"
DENSE += " --num_workers 0"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def submit(*flags: str, tree: str = "pretraining", **options) -> subprocess.CompletedProcess:
    """The launcher, as a user would call it."""
    (script,) = (ROOT / tree).glob("submitit_*.py")
    command = [sys.executable, str(script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **{"env": ENV, **options})


def dry_run(*flags: str, **options) -> str:
    result = submit("--dry_run", *flags, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ------------------------------------------------------------------------------------------- the batch script


def test_launcher_flags_become_sbatch_options():
    flags = "--job_name x --nodes 3 --ngpus 4 --timeout 90 --partition p --account a --qos q --comment c"
    flags += " --cpus_per_task 6 --mem_gb 100 --constraint big --exclude n7 --warning 60"
    script = dry_run(*flags.split(), "--slurm", "reservation=r s", "exclusive")
    assert {
        "--job-name=x",
        "--nodes=3",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=90",
        "--partition=p",
        "--account=a",
        "--qos=q",
        "--comment=c",
        "--cpus-per-task=6",
        "--mem=102400M",
        "--constraint=big",
        "--exclude=n7",
        "--signal=USR2@60",
        "--reservation='r s'",
        "--exclusive",
        "--requeue",
    } <= set(re.findall(r"^#SBATCH (.*)$", script, re.M))


def test_what_is_not_asked_for_is_left_to_the_cluster():
    script = dry_run()
    assert not re.search(r"--(partition|account|qos|mem|constraint)\b", script)


def test_the_batch_script_is_valid_bash(tmp_path):
    script = dry_run("--job_dir", "a folder/%j", "--snapshot")
    subprocess.run(["bash", "-n"], input=script, check=True, text=True)


def test_a_dry_run_needs_no_slurm_and_leaves_nothing(tmp_path):
    script = dry_run("--snapshot", cwd=tmp_path, env={**ENV, "PATH": "/nowhere"})
    assert script.startswith("#!/bin/bash")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def batch_script(tmp_path_factory) -> tuple[Path, str]:
    """A folder of stubs, where srun only saves a checkpoint and ends, and a batch script that runs in it."""
    folder = tmp_path_factory.mktemp("attempts")
    latest = f"{folder}/exp/$SLURM_JOB_ID/checkpoints/latest"
    stubs = {"srun": f'[ -z "$SAVES" ] || echo "$SAVES" > {latest}; exit $STATUS', "scontrol": 'echo "$@"'}
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder, dry_run("--job_dir", folder / "exp" / "%j")


@pytest.fixture
def attempt(batch_script):
    """A function that runs one attempt of a job, and the folder of the job."""
    folder, script = batch_script
    job = str(len(list(folder.glob("exp/*"))))
    output = folder / "exp" / job
    (output / "checkpoints").mkdir(parents=True)

    def run(saves: str, status: int) -> subprocess.CompletedProcess:
        env = {"PATH": f"{folder}:{ENV['PATH']}", "SLURM_JOB_ID": job, "SAVES": saves, "STATUS": str(status)}
        return subprocess.run(["bash"], input=script, env=env, check=False, capture_output=True, text=True)

    return run, output


@pytest.mark.parametrize(
    ("saves", "requeued"),
    [
        ([""], "n"),
        (["step_00000008", "", ""], "yyn"),
        (["step_00000008", "", "step_00000010", "", ""], "yyyyn"),
        (["step_00000008", "step_00000008-1", ""], "yyn"),  # a loss that is not finite saves where it is
        (["step_00000008-1", "", "step_00000009"], "yyy"),
        (["step_99999999", "", "step_100000000"], "yyy"),
    ],
)
def test_a_job_is_requeued_until_it_fails_three_times_at_one_step(attempt, saves, requeued):
    run, _ = attempt
    for name, again in zip(saves, requeued, strict=True):
        result = run(name, status=1)
        call, status, last = ("requeue", 0, "requeued") if again == "y" else ("", 1, "not requeued")
        assert (result.stdout.partition(" ")[0], result.returncode) == (call, status)
        assert result.stderr.splitlines()[-1].startswith(last)


def test_a_job_whose_failures_cannot_be_counted_is_not_requeued(attempt):
    """A full disk, for example; the job would be requeued for ever."""
    run, output = attempt
    (output / f"{output.name}_failures.txt").mkdir()
    result = run("step_00000008", status=1)
    assert (result.stdout, result.returncode) == ("", 1)
    assert "not requeued" in result.stderr


@pytest.mark.parametrize("status", [0, 75, 255])
def test_an_attempt_that_is_finished_or_was_stopped_is_not_requeued_as_a_failure(attempt, status):
    run, _ = attempt
    result = run("step_00000008", status)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", status)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--partitoin", "x"], "did you mean --partition?"),
        (["--epochs", "many"], "--epochs must be a positive integer, found many"),
        (["--local", "--nodes", "2"], "add --nodes 1"),
        (["--timeout", "5"], "--warning 300 (seconds) must lie within the time limit"),
        (["--nodes", "0"], "--nodes must be a positive integer, found 0"),
    ],
)
def test_mistakes_are_found_before_the_job_waits_in_the_queue(flags, message):
    result = submit(*flags)
    assert result.returncode == 2
    assert message in result.stderr


def test_an_empty_job_dir_is_the_default():
    assert "/runs/%j" in dry_run("--job_dir", "")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_second_job_for_a_folder_is_refused_while_the_first_is_there(tmp_path, state):
    for name, text in {"squeue": f"echo 5 RUNNING; echo 77 {state}", "sbatch": "exit 9"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/77_submission.sh").write_text("#!/bin/bash\n#SBATCH --nodes=1\n")
    (tmp_path / "exp/5_submission.sh").write_text("of a local run\n")
    result = submit("--job_dir", tmp_path / "exp", env={**ENV, "PATH": f"{tmp_path}:{ENV['PATH']}"})
    assert result.returncode == 1
    assert f"job 77 ({state.lower()}) already runs in {tmp_path}/exp" in result.stderr


def test_without_slurm_the_launcher_says_what_else_there_is(tmp_path):
    result = submit(cwd=tmp_path, env={**ENV, "PATH": "/nowhere"})
    assert result.returncode == 1
    assert "no SLURM here (sbatch not found): add --local --nodes 1" in result.stderr


# -------------------------------------------------------------------------------------------------- signals

SIGNALLED = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])  # before an import starts threads
from pixio.engine.signals import defer_signals, received
os.kill(os.getpid(), signal.SIGUSR2)      # while the program starts
with defer_signals():
    assert received(signal.SIGUSR2) and not received(signal.SIGTERM)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    os.kill(os.getpid(), signal.SIGTERM)
    assert received(signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_signals_are_recorded_by_the_program_and_not_seen_by_its_workers():
    ended = subprocess.run([sys.executable, "-c", SIGNALLED], check=False)
    assert ended.returncode == -signal.SIGTERM  # outside of `defer_signals` they end the process as ever


HUNG = """
import ctypes, os, signal
from pixio.engine.signals import call_if_stuck, defer_signals
lock = ctypes.create_string_buffer(64)  # as `pthread_mutex_init` leaves it
with defer_signals(), call_if_stuck(lambda: os._exit(9), grace=0.5):
    os.kill(os.getpid(), signal.{number})
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)  # no signal ends it, as none ends waiting for a device
"""


def test_a_warned_program_that_hangs_is_requeued_by_a_thread():
    ended = subprocess.run([sys.executable, "-c", HUNG.format(number="SIGUSR2")], check=False, timeout=60)
    assert ended.returncode == 9


def test_a_program_that_ends_in_time_is_left_alone():
    called = []
    with call_if_stuck(lambda: called.append(True), grace=0):
        time.sleep(0.2)  # no warning has come
    warned = HUNG.format(number="SIGUSR2").replace("range(2)", "range(1)")
    ended = subprocess.run([sys.executable, "-c", warned], check=False, timeout=60)
    assert (called, ended.returncode) == ([], 0)


ORPHANED = """
import multiprocessing, os, signal, threading, time
from pixio.engine.signals import end_workers_with_this_process
end_workers_with_this_process()
fork = multiprocessing.get_context("fork")
workers = [fork.Process(target=time.sleep, args=(300,)) for _ in range(2)]
workers[0].start()
other = threading.Thread(target=workers[1].start)  # a thread that ends takes no worker with it
other.start()
other.join()
time.sleep(0.5)
assert all(worker.is_alive() for worker in workers)
print(*(worker.pid for worker in workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_killed_program():
    with subprocess.Popen([sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, text=True) as program:
        worker, of_a_thread = map(int, program.stdout.readline().split())
        assert program.wait(timeout=60) == -signal.SIGKILL
        os.kill(of_a_thread, signal.SIGKILL)  # of which nothing can be asked
    stat, deadline = Path(f"/proc/{worker}/stat"), time.monotonic() + 10
    while stat.exists() and ") Z " not in stat.read_text():  # a zombie, where nobody collects it
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ----------------------------------------------------------------------------------------- local processes


def log_of(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(folder: Path) -> list[tuple]:
    return [(row["step"], row["images"], row["loss"], row["lr"], row["grad_norm"]) for row in log_of(folder)]


@pytest.mark.parametrize("started_in", ["pretraining", "."])
def test_local_processes_train_from_a_copy_of_the_code(started_in, tmp_path):
    if started_in == "." and sys.version_info < (3, 11):
        pytest.skip("this Python cannot be told to leave its folder out of the path")
    flags = shlex.split(f"{TINY} --dataset_type scenes --epochs 1 --iters_per_epoch 2")
    flags += ["--local", "--ngpus", 2, "--timeout", 5, "--warning", 60, "--snapshot", "--job_dir", tmp_path]
    environ = {key: value for key, value in ENV.items() if key != "PYTHONDONTWRITEBYTECODE"}
    result = submit(*flags, cwd=ROOT / started_in, env=environ)
    assert result.returncode == 0, result.stderr
    assert [row["images"] for row in log_of(tmp_path)] == [4, 8]
    (copy,) = (tmp_path / "code").iterdir()
    assert {path.name for path in copy.iterdir()} == {"pixio", "pretraining"}
    assert "runs" not in {path.name for path in (copy / "pretraining").iterdir()}
    assert list((copy / "pixio/data").rglob("*.pyc"))  # of what was imported


def test_a_failed_local_run_shows_why(tmp_path):
    flags = shlex.split(f"{TINY} --dataset_type folder --data_path /nowhere --local --ngpus 1")
    result = submit(*flags, "--job_dir", tmp_path)
    assert result.returncode == 1
    assert "/nowhere" in result.stderr


def test_ranks_of_local_submitit_processes():
    environ = {"SUBMITIT_LOCAL_NTASKS": "4", "SUBMITIT_LOCAL_GLOBALID": "3", "SUBMITIT_LOCAL_JOB_ID": "77"}
    ranks = find_ranks(environ)
    assert ranks[:4] == (3, 3, 4, 4)
    assert ranks.address.startswith("tcp://127.0.0.1:")


def test_every_attempt_of_a_job_has_a_rendezvous_of_its_own():
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
    task |= {"SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert find_ranks(task).address != find_ranks(task | {"SLURM_RESTART_COUNT": "1"}).address


# ------------------------------------------------------------------------------------------------- real SLURM

STEPS = 24
# The first attempt is slow, so that there is something to interrupt; how fast a machine is does not matter.
PACED = """
import os, sys, time
sys.path.insert(0, {tree!r})
import main_pretrain
step = main_pretrain.accumulate
def slowly(*arguments):
    time.sleep(0 if os.environ.get("SLURM_RESTART_COUNT") else float(os.environ["PACE"]))
    return step(*arguments)
main_pretrain.accumulate = slowly
if __name__ == "__main__":
    main_pretrain.main()
"""
SUBMIT_PACED = """
import sys
from pathlib import Path
sys.path.insert(0, {tree!r})
from submitit_pretrain import SubmitConfig
from pixio.engine.config import parse
from pixio.engine.slurm import launch
launch(parse(SubmitConfig), Path({script!r}))
"""


class Jobs:
    """Submits jobs below one folder and meddles with them."""

    def __init__(self, cluster: LocalSlurm, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.env = {**cluster.env, **{name: ENV[name] for name in ("OMP_NUM_THREADS",)}}
        self.env["PATH"] = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
        self.numbers: dict[str, str] = {}
        tree = str(ROOT / "pretraining")
        (folder / "paced.py").write_text(PACED.format(tree=tree))
        (folder / "submit.py").write_text(SUBMIT_PACED.format(tree=tree, script=str(folder / "paced.py")))

    def submit(self, name: str, *flags: str, command=None, **env: str) -> None:
        command = command or [sys.executable, self.folder / "submit.py"]
        flags = [*flags, "--job_dir", self.folder / name, "--cpus_per_task", "1"]
        result = subprocess.run(
            [*map(str, command), *map(str, flags)],
            env={**self.env, "PACE": "0.5", **env},
            cwd=self.folder,
            check=False,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        self.numbers[name] = re.match(r"job (\d+): log in", result.stdout)[1]

    def evaluate(self, name: str, command: str) -> None:
        """A launch script by plain sbatch, on two GPUs of the eight that its header asks for."""
        options = (
            f"--parsable --ntasks-per-node=2 --gres=gpu:2 --cpus-per-task=1 --output {self.folder}/{name}.out"
        )
        command = f"sbatch {options} {command} --output_dir {self.folder / name}"
        (self.numbers[name],) = self._numbers_from(command, ROOT / "evaluation")

    def evaluate_from_above(self, place: Path) -> None:
        """k-NN, submitted in the folder that holds evaluation/."""
        options = "--parsable --ntasks-per-node=1 --gres=gpu:1 --cpus-per-task=1"
        command = f"sbatch {options} evaluation/launch_knn.sh pixio_vitpico16 none {KNN} --output_dir above"
        (self.numbers["above"],) = self._numbers_from(command, place)

    def evaluate_all(self, place: Path) -> None:
        """All evaluations, by the script for that, in a copy of evaluation/ with its data."""
        # so many cores that two jobs run at a time
        options = "--parsable --ntasks-per-node=1 --gres=gpu:1 --cpus-per-task=128"
        flags = {"SBATCH_FLAGS": options, "DENSE_FLAGS": DENSE, "KNN_FLAGS": KNN}
        numbers = self._numbers_from("bash run_all.sh pixio_vitpico16 none", place, **flags)
        self.numbers |= zip(EVALUATIONS, numbers, strict=True)

    def _numbers_from(self, command: str, cwd: Path, **env: str) -> list[str]:
        result = subprocess.run(
            shlex.split(command),
            env={**self.env, **env},
            cwd=cwd,
            check=False,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    def wait_for_step(self, name: str, step: int) -> None:
        self.cluster.wait(lambda: len(log_of(self.folder / name)) >= step, f"step {step} of {name}", 100)

    def kill_rank(self, name: str, rank: int) -> None:
        """kill -9, as the kernel does when memory runs out."""
        wanted = {f"SLURM_JOB_ID={self.numbers[name]}", f"SLURM_PROCID={rank}", "SUBMITIT_EXECUTOR=slurm"}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environ = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                command = (process / "cmdline").read_bytes()
                if wanted <= set(environ) and b"submitit.core._submit" in command:
                    os.kill(int(process.name), signal.SIGKILL)
                    return
            except OSError:  # it has ended, or is not ours
                continue
        raise AssertionError(f"no rank {rank} of {name}")

    def finish(self) -> dict[str, dict]:
        """Wait for all jobs; their final states and how often they were started again."""
        found = {}
        for name, number in self.numbers.items():
            self.cluster.wait(
                lambda number=number: self.cluster.state(number) in ("COMPLETED", "FAILED", "CANCELLED"),
                name,
                300,
            )
            shown = self.cluster.call("scontrol", "show", "job", number)
            found[name] = {
                "number": number,
                "state": self.cluster.state(number),
                "restarts": int(re.search(r"Restarts=(\d+)", shown)[1]),
            }
        return found


EVALUATIONS = [
    *(f"monodepth/{data}_{head}" for data in ("kitti", "nyuv2") for head in ("dpt", "linear")),
    *(f"semseg/{data}_{head}" for data in ("ade20k", "loveda", "pascal") for head in ("dpt", "linear")),
    "knn",
]


WEB = "--hist_thresh 0.1 --imgres_thresh 32"
TEACH = TINY.partition(" ")[2].partition(" ")[2]  # all but --model
TEACH += " --teacher_model pixio_vitpico16 --student_models pixio_vitpico16 pixio_vitti16"
DISTILL = "distillation/scripts/distill_pixio_vit5b16_to_"
PUBLISHED = {
    "imagenet": ("pretraining/scripts/pretrain_pixio_vith16_imagenet.sh", TINY),
    "webdata": ("pretraining/scripts/pretrain_pixio_vit5b16_webdata.sh", f"{TINY} {WEB}"),
    "distilled": (f"{DISTILL}vit1b16+vith16_imagenet.sh", TEACH),
    "distilled_web": (f"{DISTILL}vit1b16+vith16_webdata.sh", f"{TEACH} {WEB}"),
    "distilled_small": (f"{DISTILL}vitl16+vitb16_imagenet.sh", TEACH),
}


def copy_evaluation(place: Path, imagenet: Path) -> None:
    """A copy of evaluation/ and, in its data/, a few images of every data set."""
    leave = shutil.ignore_patterns("runs", "data", "__pycache__")
    shutil.copytree(ROOT / "evaluation", place, ignore=leave)
    for layout in ("nyuv2", "kitti", "ade20k", "pascal", "loveda"):
        root = place / "data" / {"nyuv2": "nyud"}.get(layout, layout)
        write_tree(layout, root, train=2, val=1 if layout == "nyuv2" else 2, size=32)  # NYUv2's are large
    for file in (place / "data/kitti").rglob("*.png"):  # of full size they would take their time
        Image.open(file).resize((96, 32), Image.Resampling.NEAREST).save(file)
    (place / "data/imagenet").symlink_to(imagenet)
    command = [sys.executable, place / "semseg/util/process_loveda.py", place / "data/loveda"]
    subprocess.run(command, check=True, env=ENV, stdout=subprocess.DEVNULL)


def run_jobs(folder: Path) -> dict[str, dict]:
    """Everything that is tried on the cluster, side by side."""
    write_tree("imagenet-tars", folder / "tars", 24, 0, size=32, per_tar=8)
    write_tree("web-tars", folder / "web", 24, 0, size=32, per_tar=8)
    write_tree("imagenet-folders", folder / "folders", 24, 8, size=32)
    copy_evaluation(folder / "evaluation", folder / "folders")
    shutil.copytree(folder / "evaluation/data/ade20k", folder / "damaged")
    (folder / "damaged/images/validation/ADE_val_00000002.jpg").write_bytes(b"no image")  # rank 1 reads it
    torch.save(pixio.pixio_vitpico16(img_size=32).state_dict(), folder / "teacher.pth")
    data = {"IMAGENET_TARS": str(folder / "tars"), "WEB_TARS": f"{folder}/web/tars"}
    data["WEB_STATS"] = f"{folder}/web/stats"
    with LocalSlurm(port=23000 + 10 * (os.getpid() % 100)) as cluster:
        jobs = Jobs(cluster, folder)
        tiny = shlex.split(TINY)
        paced = [*tiny, "--dataset_type", "imagenet", "--data_path", folder / "tars", "--drop_path", "0.1"]
        paced += ["--epochs", "2", "--iters_per_epoch", STEPS // 2, "--save_steps", "3", "--timeout", "60"]
        spread, together = [*paced, "--nodes", "2", "--ngpus", "1"], [*paced, "--nodes", "1", "--ngpus", "2"]
        # the shortest limit that leaves a slow and busy node time to start, and far from enough for all steps
        limit = ["--timeout", "2", "--warning", "60", "--save_steps", "0"]
        jobs.submit("limited", *spread, *limit, PACE="6")
        jobs.submit("preempted", *together, "--partition", "low", "--save_steps", "0", PACE="3")
        jobs.submit("requeued", *spread, PACE="3")
        jobs.submit("killed", *spread, "--parallel", "fsdp", PACE="3")
        jobs.wait_for_step("preempted", 4)
        cluster.call("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        jobs.wait_for_step("requeued", 4)
        cluster.call("scontrol", "requeue", jobs.numbers["requeued"])
        jobs.wait_for_step("killed", 4)
        jobs.kill_rank("killed", 1)
        jobs.submit("whole", *spread, PACE="0")
        jobs.submit("hopeless", *spread, "--data_path", folder / "nothing")
        jobs.submit("diverging", *paced, "--nodes", "1", "--ngpus", "1", "--lr", "1e38", PACE="0")
        short = ["--epochs", "1", "--iters_per_epoch", "2", "--timeout", "10"]
        jobs.evaluate("evaluated", f"launch_knn.sh pixio_vitpico16 none --data_path {folder}/folders {KNN}")
        jobs.evaluate("misled", f"launch_knn.sh pixio_vitpico16 none --data_path {folder}/nothing {KNN}")
        cluster.wait(lambda: cluster.state(jobs.numbers["evaluated"]) == "RUNNING", "the evaluation", 60)
        cluster.wait((folder / "evaluated.out").exists, "the output of the evaluation", 60)
        cluster.call("scancel", "--batch", "--signal=USR2", jobs.numbers["evaluated"])
        environ = {**data, "TEACHER": str(folder / "teacher.pth")}
        for name, (script, flags) in PUBLISHED.items():
            # two tasks on each of two nodes where the script shards within a node
            size = ["--nodes", "2", "--ngpus", "2" if "hybrid" in (ROOT / script).read_text() else "1"]
            jobs.submit(name, *short, *size, *shlex.split(flags), command=["bash", ROOT / script], **environ)
        kitti, ade20k = folder / "evaluation/data/kitti", folder / "damaged"
        command = "launch_monodepth.sh monodepth/configs/kitti_linear.yaml pixio_vitpico16 none"
        jobs.evaluate("depth", f"{command} --data_root {kitti} {DENSE} --panels 1")
        command = "launch_semseg.sh semseg/configs/ade20k_linear.yaml pixio_vitpico16 none"
        jobs.evaluate("stranded", f"{command} --data_root {ade20k} {DENSE}")
        jobs.evaluate_from_above(folder)
        jobs.evaluate_all(folder / "evaluation")
        found = jobs.finish()
    for large in (folder / "evaluation/runs").glob("*_dpt_*"):  # half a GB each
        shutil.rmtree(large / "checkpoints")
        (large / "head.pth").unlink()
    return found


@pytest.fixture(scope="session")
def jobs(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """The folder of all jobs and what became of them; run once, whatever the number of test processes."""
    if not available():
        assert not os.environ.get("PIXIO_REQUIRE_SLURM"), "PIXIO_REQUIRE_SLURM is set, but there is no SLURM"
        pytest.skip("no SLURM here (apt-get install slurm-wlm munge, as root)")
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared) / "cluster"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = shared / "results.json"
        if not results.exists():
            results.write_text("null")  # an error below is not tried again by every process
            results.write_text(json.dumps(run_jobs(shared)))
        found = json.loads(results.read_text())
    assert found is not None, "the jobs failed in another test process"
    return shared, found


def said(folder: Path, job: dict) -> str:
    """Everything a job has written."""
    return "\n".join(path.read_text() for path in sorted(folder.glob(f"{job['number']}_*_log.*")))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_scripts_run_to_the_end(jobs, name):
    folder, found = jobs
    assert found[name]["state"] == "COMPLETED", said(folder / name, found[name])
    ranks = 4 if "hybrid" in (ROOT / PUBLISHED[name][0]).read_text() else 2
    assert [row["images"] for row in log_of(folder / name)] == [2 * ranks, 4 * ranks]
    assert list((folder / name).glob("encoder*.pth"))


@pytest.mark.parametrize("name", ["preempted", "limited", "requeued"])
def test_an_interrupted_job_continues_and_ends_as_an_undisturbed_one(jobs, name):
    folder, found = jobs
    assert found["whole"] | {"number": 0} == {"number": 0, "state": "COMPLETED", "restarts": 0}
    assert found[name]["state"] == "COMPLETED", said(folder / name, found[name])
    assert found[name]["restarts"] >= 1
    assert len(losses(folder / "whole")) == STEPS
    assert losses(folder / name) == losses(folder / "whole")


def test_a_killed_job_with_shards_continues_and_ends_as_one_with_copies(jobs):
    folder, found = jobs
    job = found["killed"]
    assert (job["state"], job["restarts"] >= 1) == ("COMPLETED", True), said(folder / "killed", job)
    for shards, copies in zip(losses(folder / "killed"), losses(folder / "whole"), strict=True):
        assert shards == pytest.approx(copies, rel=1e-3)


@pytest.mark.parametrize("name", ["preempted", "limited"])
def test_a_warned_job_saves_where_it_is(jobs, name):
    """These two save at no other time but the end."""
    folder, found = jobs
    text = said(folder / name, found[name])
    assert "Caught signal SIGUSR2" in text
    assert "Traceback" not in text, text


def test_a_job_that_fails_before_it_has_saved_is_not_tried_again(jobs):
    folder, found = jobs
    assert (found["hopeless"]["state"], found["hopeless"]["restarts"]) == ("FAILED", 0)
    assert "nothing" in said(folder / "hopeless", found["hopeless"])


def test_a_job_that_fails_three_times_at_the_same_step_stays_down(jobs):
    folder, found = jobs
    text = said(folder / "diverging", found["diverging"])
    assert (found["diverging"]["state"], found["diverging"]["restarts"]) == ("FAILED", 2), text
    assert text.count("the loss is not finite") >= 3
    failures = re.findall(r"failed with status 1, failure (\d) since step \d+ was saved", text)
    assert failures == ["1", "2", "3"], text
    assert "not requeued: nothing saved, 3 failures since" in text


def test_a_warned_evaluation_is_requeued_and_runs_to_the_end(jobs):
    folder, found = jobs
    text = (folder / "evaluated.out").read_text()
    assert found["evaluated"]["state"] == "COMPLETED", text
    assert found["evaluated"]["restarts"] == 1, text


def test_two_ranks_of_a_dense_evaluation_run_to_the_end(jobs):
    folder, found = jobs
    assert found["depth"]["state"] == "COMPLETED", (folder / "depth.out").read_text()
    assert json.loads((folder / "depth/results.json").read_text())["ranks"] == 2
    assert (folder / "depth/panels.png").is_file()


def test_all_evaluations_of_an_encoder_run_to_the_end_and_fill_the_table(jobs):
    folder, found = jobs
    place = folder / "evaluation"
    for name in EVALUATIONS:
        output = place / f"slurm-{found[name]['number']}.out"
        assert found[name]["state"] == "COMPLETED", f"{name}: {output.exists() and output.read_text()}"
    command = [sys.executable, "collect_results.py"]
    table = subprocess.run(command, cwd=place, check=True, capture_output=True, text=True).stdout
    rows = [line.split(" | ") for line in table.splitlines() if "pixio_vitpico16" in line]
    assert [len(row) for row in rows] == [1 + len(EVALUATIONS)] * 2
    assert not any("-" in cell for row in rows for cell in row[1:])


def test_an_evaluation_can_be_submitted_above_its_folder(jobs):
    folder, found = jobs
    output = folder / f"slurm-{found['above']['number']}.out"
    assert found["above"]["state"] == "COMPLETED", output.exists() and output.read_text()
    assert (folder / "evaluation/above/results.json").is_file()


@pytest.mark.parametrize(("name", "reason"), [("misled", "nothing"), ("stranded", "ADE_val_00000002.jpg")])
def test_a_failing_task_fails_the_job(jobs, name, reason):
    """Of the second job one task fails, while the other waits for it."""
    folder, found = jobs
    assert found[name]["state"] == "FAILED"
    assert reason in (folder / f"{name}.out").read_text()
