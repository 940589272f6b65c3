"""Which rank this process is, whatever started it, and what the ranks of a run do together."""

import functools
import re
import socket
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pixio.engine import signals
from pixio.engine.program import explain
from pixio.engine.rendezvous import Watchdog, rendezvous

LONGEST_START = timedelta(minutes=30)  # from the first rank's start to the last's


# Rank, world size, local rank and local world size under mpirun: Open MPI; MPICH and Intel MPI.
_MPI = (
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


class Ranks(NamedTuple):
    """Which process of the run this one is, and where all of them rendezvous."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # the most processes on any node of the run; 0 = unknown
    address: str | None = None
    one_gpu_each: bool = False  # where one GPU is visible it may be this process's own


def find_ranks(
    environ: Mapping[str, str],
    world_size: int | None = None,
    local_rank: int | None = None,
    dist_url: str | None = None,
    port: int | None = None,
) -> Ranks:
    """Ranks of this process, from `environ` and the arguments of `start_runtime`.

    Raises:
        ValueError: a variable or a rank is out of range, or the arguments contradict the launcher.
    """
    environ = {name: value.strip() for name, value in environ.items() if value.strip()}  # empty is unset
    if port is not None:
        environ.setdefault("MASTER_PORT", str(port))
    asked = world_size if world_size is not None and world_size > 1 else None
    dist_url = None if dist_url == "env://" else dist_url
    if environ.keys() >= {"RANK", "WORLD_SIZE"}:
        ranks = Ranks(
            rank=_number(environ, "RANK"),
            # Launchers that start one process per container set no local variables.
            local_rank=_number(environ, "LOCAL_RANK", max(local_rank or 0, 0)),
            world_size=_number(environ, "WORLD_SIZE"),
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE", 0),
            address=_address(environ),
        )
    elif asked and local_rank is not None and local_rank >= 0:
        ranks = Ranks(local_rank, local_rank, asked, asked, _address(environ))
        if not dist_url and "MASTER_ADDR" not in environ:
            raise ValueError(
                f"--world_size {asked} needs an address for the rendezvous, the same on all ranks: "
                "--dist_url tcp://127.0.0.1:29500"
            )
    else:
        ranks = _launched_ranks(environ) or Ranks()
        if ranks.world_size == 1:
            _explain_missing_ranks(environ, asked)
    if asked and asked != ranks.world_size:
        raise ValueError(
            f"--world_size is {asked}, but the launcher started {ranks.world_size}: leave it out"
        )
    if ranks.rank >= ranks.world_size:
        raise ValueError(
            f"rank {ranks.rank} does not exist: {ranks.world_size} processes are numbered from 0"
        )
    single_gpu = any("," not in environ.get(name, ",") for name in _VISIBLE_GPUS)
    return ranks._replace(address=dist_url or ranks.address, one_gpu_each=ranks.one_gpu_each or single_gpu)


def _launched_ranks(environ: Mapping[str, str]) -> Ranks | None:
    """Ranks under mpirun, submitit's local processes, or srun; None: none of these started the process."""
    number = functools.partial(_number, environ)
    if mpi := next((names for names in _MPI if environ.keys() >= set(names)), None):
        rank, size, local_rank, local_size = map(number, mpi)
        launch = zlib.crc32(environ.get("PMIX_NAMESPACE", "").encode())
        address = _address(environ, "127.0.0.1" if local_size == size else None, launch)
        return Ranks(rank, local_rank, size, local_size, address)
    if number("SUBMITIT_LOCAL_NTASKS", 1) > 1:
        rank, size = number("SUBMITIT_LOCAL_GLOBALID"), number("SUBMITIT_LOCAL_NTASKS")
        return Ranks(rank, rank, size, size, _address(environ, "127.0.0.1", number("SUBMITIT_LOCAL_JOB_ID")))
    if (size := number("SLURM_STEP_NUM_TASKS", 1)) > 1:
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as "2(x3),1"
        most = max(map(int, re.findall(r"(\d+)(?:\(x\d+\))?", tasks)))
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        # Another port for each attempt of a job: an old process may still listen on the last one.
        attempt = [number(f"SLURM_{name}", 0) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
        address = _address(environ, expand_node_list(nodes)[0], *attempt)
        place = number("SLURM_PROCID"), number("SLURM_LOCALID")
        return Ranks(*place, size, most, address, one_gpu_each=True)
    return None


def _number(environ: Mapping[str, str], name: str, default: int | None = None, most: int = 2**32) -> int:
    text = environ.get(name, default)
    if text is None:
        raise ValueError(f"{name} is not set, but other variables of its launcher are: set it or unset them")
    if not str(text).isdecimal() or int(text) > most:
        raise ValueError(f"{name} must be an integer from 0 to {most}, found {text!r}: correct or unset it")
    return int(text)


def _explain_missing_ranks(environ: Mapping[str, str], asked: int | None) -> None:
    """Without a launcher there is one process, whatever was allocated: waiting for others would hang."""
    if asked:
        raise ValueError(
            f"--world_size {asked} without a launcher needs --local_rank, 0 to {asked - 1}, for each "
            "process; or start the run with torchrun or srun"
        )
    if "RANK" in environ or _number(environ, "WORLD_SIZE", 1) > 1:
        found, missing = ("RANK", "WORLD_SIZE") if "RANK" in environ else ("WORLD_SIZE", "RANK")
        raise ValueError(
            f"{found} is {environ[found]}, but {missing} is not set: set both, or neither for one process"
        )
    if _number(environ, "SLURM_NTASKS", 1) > 1:
        warnings.warn(
            f"SLURM allocated {environ['SLURM_NTASKS']} tasks, but this process was not started by srun: it "
            "runs alone. Put srun before the command to use them all.",
            stacklevel=4,
        )


def _address(environ: Mapping[str, str], host: str | None = None, *launch: int) -> str:
    """What MASTER_ADDR and MASTER_PORT say, else `host` and a port made from the numbers of the `launch`."""
    host = environ.get("MASTER_ADDR", host)
    if not host or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # its agent listens already
        return "env://"
    # Neighbors get different ports, below the range that systems assign by themselves.
    mixed = functools.reduce(lambda sum, part: sum * 37 + part, launch, 0)
    port = _number(environ, "MASTER_PORT", 10_000 + mixed % 20_000 if launch else 29_500, most=65_535)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


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
            self.watchdog.beat()

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
        count = torch.full((), int(flag), device=self.device)  # `torch.tensor` would wait for its copy
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

    def agree(self, function: Callable[[], Any]) -> Any:
        """Collective: what `function()` returns; where it fails on one rank, all raise its message.

        Raises:
            ValueError: `function` has failed on some rank; where that is no user's mistake, its own error is
                raised there.
        """
        value = failure = error = None
        try:
            value = function()
        except (OSError, ValueError, ImportError) as mistake:
            failure = explain(mistake)
        except Exception as caught:
            error, failure = caught, f"rank {self.rank}: {type(caught).__name__}: {caught}"
        if failures := [text for text in self.gather(failure) if text]:
            raise error or ValueError(failures[0])
        return value

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
    assert ranks.address is not None
    world = ranks.rank, ranks.world_size
    store = rendezvous(ranks.address, *world, min(timeout, LONGEST_START))
    on_gpu = device.type == "cuda"
    if on_gpu:
        _check_gpus(store, ranks, device)
    watchdog = Watchdog(store, *world, timeout, _mark if on_gpu else None)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=2 * timeout,
        device_id=device if on_gpu else None,
    )
    return watchdog


def _mark() -> Callable[[], bool]:
    """Record an event in the work queued on the GPU; the function returned tells whether it is reached."""
    event = torch.cuda.Event()
    event.record()
    return event.query


def _check_gpus(store: dist.Store, ranks: Ranks, device: torch.device) -> None:
    """Collective: refuse ranks that share a GPU, as tasks may to which SLURM shows one each."""
    gpus = [f"gpu/{rank}" for rank in range(ranks.world_size)]
    uuid = torch.cuda.get_device_properties(device).uuid
    store.set(gpus[ranks.rank], f"{uuid} on {socket.gethostname()}")
    store.wait(gpus)
    owners: dict[bytes, int] = {}
    for rank, gpu in enumerate(store.multi_get(gpus)):
        if (owner := owners.setdefault(gpu, rank)) != rank:
            time.sleep(1)  # this process may hold the store, and the others read it too
            raise ValueError(f"ranks {owner} and {rank} share GPU {gpu.decode()}: start one process per GPU")
