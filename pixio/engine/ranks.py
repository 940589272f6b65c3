"""Which rank this process is, whatever started it, and what the ranks of a run do together."""

import re
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pixio.engine import signals
from pixio.engine.rendezvous import Watchdog, rendezvous

LONGEST_START = timedelta(minutes=30)  # from the first rank's start to the last's


class Ranks(NamedTuple):
    """Which process of the run this one is, and where all of them rendezvous."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # the most processes on any node of the run; 0: the launcher did not say
    address: str | None = None
    one_gpu_each: bool = False  # each process sees only its own GPU


def find_ranks(
    environ: Mapping[str, str],
    world_size: int | None = None,
    local_rank: int | None = None,
    dist_url: str | None = None,
) -> Ranks:
    """Ranks of this process, from `environ` and the arguments of `start_runtime`.

    Raises:
        ValueError: a rank out of range, no rendezvous address, or arguments that contradict the launcher.
    """
    asked = world_size if world_size is not None and world_size > 1 else None
    dist_url = None if dist_url == "env://" else dist_url
    if "RANK" in environ and "WORLD_SIZE" in environ:
        ranks = Ranks(
            rank=int(environ["RANK"]),
            # Launchers that start one process per container set no local variables.
            local_rank=int(environ.get("LOCAL_RANK", 0)),
            world_size=int(environ["WORLD_SIZE"]),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", 0)),
            address=dist_url or _master_address(environ),
        )
    elif asked:
        if local_rank is None or local_rank < 0:
            raise ValueError(
                f"--world_size {asked} without a launcher needs --local_rank, 0 to {asked - 1}, for each "
                "process; or start the run with torchrun or srun"
            )
        if not dist_url and "MASTER_ADDR" not in environ:
            raise ValueError(
                f"--world_size {asked} needs an address for the rendezvous, the same on all ranks: "
                "--dist_url tcp://127.0.0.1:29500"
            )
        ranks = Ranks(local_rank, local_rank, asked, asked, dist_url or _master_address(environ))
    elif int(environ.get("SUBMITIT_LOCAL_NTASKS", 1)) > 1:
        rank, size = int(environ["SUBMITIT_LOCAL_GLOBALID"]), int(environ["SUBMITIT_LOCAL_NTASKS"])
        port = _port(int(environ["SUBMITIT_LOCAL_JOB_ID"]))
        ranks = Ranks(rank, rank, size, size, dist_url or f"tcp://127.0.0.1:{port}")
    elif int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        ranks = _slurm_ranks(environ, dist_url)
    else:
        # Without srun there is one process, whatever was allocated: waiting for others would hang.
        if int(environ.get("SLURM_NTASKS", 1)) > 1:
            warnings.warn(
                f"SLURM allocated {environ['SLURM_NTASKS']} tasks, but this process was not started by srun: "
                "it runs alone. Put srun before the command to use them all.",
                stacklevel=3,
            )
        ranks = Ranks()
    if asked and asked != ranks.world_size:
        raise ValueError(
            f"--world_size is {asked}, but the launcher started {ranks.world_size}: leave it out"
        )
    if not 0 <= ranks.rank < ranks.world_size:
        raise ValueError(
            f"rank {ranks.rank} does not exist: {ranks.world_size} processes are numbered from 0"
        )
    return ranks


def _master_address(environ: Mapping[str, str]) -> str:
    """What MASTER_ADDR and MASTER_PORT say; under torchrun its own agent may already listen there."""
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if not host or not port or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "env://"
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _slurm_ranks(environ: Mapping[str, str], dist_url: str | None) -> Ranks:
    """Ranks of one task of an srun step; the rendezvous is on the first node of the step."""
    # Another port for each step and each attempt of a job: an old process may still listen on the last one.
    parts = (environ.get(f"SLURM_{name}", 0) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    port = environ.get("MASTER_PORT") or _port(*map(int, parts))
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    host = environ.get("MASTER_ADDR") or expand_node_list(nodes)[0]
    tasks = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # "2(x3),1"
    return Ranks(
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_world_size=max(map(int, tasks)),
        address=dist_url or f"tcp://{host}:{port}",
        one_gpu_each="SLURM_GPUS_PER_TASK" in environ,
    )


def _port(*numbers: int) -> int:
    """A port that neighbouring numbers do not share, below the range that systems assign by themselves."""
    mixed = 0
    for number in numbers:
        mixed = mixed * 37 + number
    return 10_000 + mixed % 20_000


def expand_node_list(text: str) -> list[str]:
    """Host names in SLURM's short notation: "n[1-3,7],login1" is n1, n2, n3, n7, login1.

    Raises:
        ValueError: `text` is not such a list.
    """
    hosts = []
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not items or ",".join(items) != text:
        raise ValueError(f"not a SLURM node list: {text!r}")
    for item in items:
        head, bracket, remainder = item.partition("[")
        if not bracket:
            hosts.append(item)
            continue
        numbers, _, tail = remainder.partition("]")
        tails = expand_node_list(tail) if tail else [""]
        for part in numbers.split(","):
            if not re.fullmatch(r"\d+(-\d+)?", part):
                raise ValueError(f"not a SLURM node list: {text!r}")
            low, _, high = part.partition("-")
            span = range(int(low), int(high or low) + 1)
            # Leading zeros of the first number say how many digits each has.
            hosts += [f"{head}{n:0{len(low)}d}{tail}" for n in span for tail in tails]
    return hosts


@dataclass(frozen=True)
class Collectives:
    """One rank among those of its run: collectives, which every rank must call; with one rank they are free.

    Attributes:
        device: where tensors are exchanged.
        watchdog: ends the run when the others wait too long for one rank.
    """

    device: torch.device
    _: KW_ONLY
    rank: int = 0
    world_size: int = 1
    watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0

    def heartbeat(self) -> None:
        """Count another point that all ranks pass in the same order, for the watchdog."""
        if self.watchdog is not None:
            self.watchdog.heartbeats += 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Collective: the mean of `tensor` over ranks, on the device, detached; waits for nothing."""
        if self.world_size == 1:
            return tensor.detach()
        self.heartbeat()
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total / self.world_size

    def any(self, flag: bool) -> bool:
        """Collective: True on every rank when `flag` is true on at least one. Waits for the device."""
        if self.world_size == 1:
            return flag
        self.heartbeat()
        count = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(count)
        return count.item() > 0

    def asked_to_stop(self) -> bool:
        """Collective: whether a signal has asked any rank to stop; see `pixio.engine.signals`."""
        return self.any(signals.received())

    def gather(self, value: Any) -> list[Any]:
        """Collective: the small picklable `value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        self.heartbeat()
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Collective: wait until every rank is here."""
        if self.world_size > 1:
            self.heartbeat()
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def close(self) -> None:
        """Leave the process group, if this run has one.

        A failing process does not wait for the others, as NCCL would: they may be waiting for it, and its
        error message would never appear.
        """
        if self.watchdog is not None:
            self.watchdog.close()
        if self.world_size > 1 and dist.is_initialized():
            failure = sys.exc_info()[1]
            if failure is None or isinstance(failure, SystemExit):  # the latter is raised by all ranks
                dist.destroy_process_group()
            # A gloo thread drops the last tensor a moment after its collective returned, and needs the
            # interpreter for that: one that is already shutting down would abort the process.
            time.sleep(0.1)


def join_ranks(ranks: Ranks, device: torch.device, timeout: timedelta) -> Watchdog:
    """Rendezvous with the other ranks and make the default process group.

    Args:
        ranks: at least two.
        device: of this process; GPUs talk over NCCL, CPUs over gloo.
        timeout: how long the watchdog lets ranks wait for another; collectives time out after twice that.

    Raises:
        OSError: the other ranks cannot be reached, or some did not come.
    """
    world = ranks.rank, ranks.world_size
    store = rendezvous(ranks.address, *world, min(timeout, LONGEST_START))
    watchdog = Watchdog(store, *world, timeout)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=2 * timeout,
        device_id=device if on_gpu else None,
    )
    return watchdog
