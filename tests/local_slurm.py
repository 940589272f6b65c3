"""A real SLURM cluster on loopback, for tests: munge, one controller and three nodes (needs root and Linux).

Nodes n1 and n2 are the default partition; n3 belongs to `low` and to `high`, which pushes out jobs of `low`.
Each node claims 256 cores, 2 TB and 8 GPUs, whatever the machine has, and has its own host name.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
NODES = ("n1", "n2", "n3")

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=1
KillWait=10
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=n1,n2 Default=YES
PartitionName=low Nodes=n3 PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n3 PriorityTier=2
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} "
NODE += "CPUs=256 RealMemory=2000000 Gres=gpu:8\n"


def available() -> bool:
    """Whether a cluster can be started here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return os.geteuid() == 0 and all(shutil.which(program, path=path) for program in PROGRAMS)


class LocalSlurm:
    """A cluster that runs inside `with`; `env` is the environment for sbatch and what calls it."""

    def __init__(self, port: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds a socket
        self.folder.chmod(0o755)
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "LC_ALL": "C"}
        self.env["PATH"] += ":/usr/sbin:/sbin"
        self._port = port
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "LocalSlurm":
        try:
            self._configure()
            self._start()
        except BaseException:
            self._end_daemons()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.call("scancel", "--user=root")
        self.wait(lambda: not self.call("squeue", "--noheader"), "all jobs to end", 30)
        self._end_daemons()
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *command: str) -> str:
        """What a SLURM command prints."""
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, …"""
        return self.call("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").strip()

    def wait(self, condition, what: str, seconds: float) -> None:
        """Poll until `condition()` holds."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self._daemons):
                logs = "\n".join(path.read_text()[-1500:] for path in self.folder.glob("*.log"))
                raise TimeoutError(f"waited {seconds} s for {what}\n{logs}")
            time.sleep(0.2)

    def _configure(self) -> None:
        host = subprocess.run(["hostname", "-s"], check=True, capture_output=True, text=True).stdout.strip()
        config = CONFIG.format(host=host, port=self._port, folder=self.folder)
        hosts = Path("/etc/hosts").read_text() + f"127.0.0.1 {' '.join(NODES)}\n"
        for number, name in enumerate(NODES, 1):
            config += NODE.format(name=name, port=self._port + number)
            # its own name first, or the node would take itself for "localhost"
            (self.folder / f"hosts-{name}").write_text(f"127.0.0.1 {name}\n{hosts}")
            (self.folder / f"spool-{name}").mkdir()
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(config)
        for gpu in range(8):  # must be devices, in the order of their names
            (self.folder / f"gpu{gpu}").symlink_to("/dev/null")
        gres = f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu[0-7] Flags=nvidia_gpu_env\n"
        (self.folder / "gres.conf").write_text(gres)
        # slurmd loads the plugin even where nothing uses it, and this one asks nothing of the machine
        (self.folder / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint={self.folder}/cgroup\n"
        )

    def _start(self) -> None:
        folder = self.folder
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "seed", "log")]
        self._daemon("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        self.wait((folder / "munge.socket").exists, "munge", 20)
        self._daemon("slurmctld", "slurmctld", "-D")
        for name in NODES:
            node = f"hostname {name}; mount --bind {folder}/hosts-{name} /etc/hosts; exec slurmd -D -N {name}"
            self._daemon(f"slurmd-{name}", "unshare", "--uts", "--mount", "sh", "-ec", node)
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D", "--partition=main,low")
        self.wait(lambda: self._quietly(*idle).strip() == str(len(NODES)), "idle nodes", 60)

    def _quietly(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False).stdout

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            daemon = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _end_daemons(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
