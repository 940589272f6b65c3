"""The one place that knows devices, ranks and precision: from here laptop, torchrun and SLURM look alike.

Everything else in the project asks a `Runtime` and never an environment variable or a device library.
"""

import contextlib
import functools
import hashlib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pixio.engine import signals
from pixio.engine.rendezvous import Watch, meet

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GIB = 2**30
LONGEST_START = timedelta(minutes=30)  # from the first rank's start to the last's


@dataclass(frozen=True)
class Runtime:
    """One process of a run: its device, its place among the ranks, and the precision it computes in.

    The methods named after collectives must be called by every rank; with one rank they cost nothing.

    Attributes:
        mesh: the ranks that share one copy of each model in shards (its last dimension); None: each rank has
            a copy of its own.
        host_group: the ranks, for exchange between hosts beside what the devices exchange; with a mesh only.
        watch: names a rank that the others wait for in vain.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    host_group: dist.ProcessGroup | None = None
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0

    @property
    def pins_memory(self) -> bool:
        """True where batches in pinned memory reach the device faster."""
        return self.device.type == "cuda"

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in `dtype` where that is safe; weights stay float32, and float32 changes nothing."""
        with contextlib.ExitStack() as stack:
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(self.device.type, dtype=self.dtype))
                if self.device.type == "cpu" and torch.is_grad_enabled():
                    # torch's fused attention is slow backwards on CPUs in half precision
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    def make_scaler(self) -> torch.amp.GradScaler:
        """Gradient scaler: active in fp16, whose range is too small for gradients, transparent otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def seed(self, seed: int, step: int, part: str = "") -> None:
        """Make torch's random numbers a pure function of (seed, step, rank, part): no generator needs saving.

        Parts of a step that name themselves draw the same numbers whatever the others draw.
        """
        text = f"{seed}/{step}/{self.rank}{part and '/'}{part}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True))

    def wrap(self, model: nn.Module, recompute: bool = False) -> nn.Module:
        """Move `model` to the device and make its gradients the mean over ranks; rank 0's weights reach all.

        Only parameters that require a gradient now take part: wrap again after freezing or thawing some. With
        a mesh the parameters of `model` itself become shards (so make the optimizer afterwards).

        Args:
            model: its blocks, the members of its module lists, are what is sharded and recomputed one by one.
            recompute: run each block again in the backward pass instead of keeping its activations.
        """
        if recompute:
            options = {"use_reentrant": False}
            if (
                self.device.type == "cpu"
            ):  # torch brings back autocast, but not the kernels chosen with it here
                options["context_fn"] = lambda: (contextlib.nullcontext(), self.autocast())
            for block in blocks_of(model):
                block.forward = functools.partial(checkpoint, block.forward, **options)
        if self.mesh is not None:
            return shard(model, self.mesh, self.dtype, self._start_from_rank_0)
        if self.world_size == 1:
            return model.to(self.device)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return self._start_from_rank_0(model)
        model = model.to(self.device)
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    def _start_from_rank_0(self, unit: nn.Module) -> nn.Module:
        for tensor in (*unit.to(self.device).parameters(), *unit.buffers()):
            if not isinstance(tensor, DTensor):  # of a block that is sharded already
                dist.broadcast(tensor.detach(), src=0)
        return unit

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model itself, without what `wrap` and `torch.compile` put around it."""
        while True:
            if isinstance(model, DistributedDataParallel):
                model = model.module
            elif hasattr(model, "_orig_mod"):  # torch.compile
                model = model._orig_mod
            else:
                return model

    def passed(self) -> None:
        """Note that this rank has come past another point that all ranks pass, for those that wait for it."""
        if self.watch is not None:
            self.watch.passed += 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Collective: the mean of `tensor` over ranks, on the device, detached; waits for nothing."""
        if self.world_size == 1:
            return tensor.detach()
        self.passed()
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total / self.world_size

    def any(self, flag: bool) -> bool:
        """Collective: True on every rank when `flag` is true on at least one. Waits for the device."""
        if self.world_size == 1:
            return flag
        self.passed()
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
        self.passed()
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Collective: wait until every rank is here."""
        if self.world_size > 1:
            self.passed()
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def synchronize(self) -> None:
        """Wait for the device to finish what was queued: for timings only."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def memory(self) -> float:
        """Peak memory in GiB: allocated by torch on a GPU, resident in this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GIB
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory() / GIB
        import resource  # not on every system that has a GPU

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # bytes there, KiB on Linux

    def close(self) -> None:
        """Leave the process group, if this run has one.

        A process that is failing does not wait for the others, as NCCL would: they may be waiting for it, and
        what went wrong would never be said.
        """
        if self.watch is not None:
            self.watch.close()
        if self.world_size > 1 and dist.is_initialized():
            failure = sys.exc_info()[1]
            if failure is None or isinstance(failure, SystemExit):  # the latter is raised by all ranks
                dist.destroy_process_group()
            # A gloo thread drops the last tensor a moment after its collective returned, and needs the
            # interpreter for that: one that is already shutting down would abort the process.
            time.sleep(0.1)


def start_runtime(
    device: str = "auto",
    dtype: str = "bf16",
    world_size: int | None = None,
    local_rank: int | None = None,
    dist_url: str | None = None,
    parallel: Literal["ddp", "fsdp", "hybrid"] = "ddp",
    timeout_minutes: float = 30.0,
) -> Runtime:
    """Find this process's ranks, choose its device and precision, and join the other ranks.

    Ranks come from torchrun's variables, else from the arguments, else from an srun step; else there is one.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".
        dtype: what autocast computes in, "bf16", "fp16" or "fp32" (no autocast). Weights are always float32.
        world_size: processes, all on this machine, of a run started by hand; None or 1: the launcher knows.
        local_rank: which of them this is; None or -1: the launcher knows.
        dist_url: where they meet, as "tcp://127.0.0.1:29500"; None or "env://": MASTER_ADDR, MASTER_PORT.
        parallel: what `Runtime.wrap` does with a model: a copy on every rank (ddp), shards over all ranks
            (fsdp), or shards over the ranks of a machine and a copy on every machine (hybrid).
        timeout_minutes: how long ranks wait for another before all end with a message that names it; where
            it cannot be told who is missing, torch ends them after twice this time.

    Raises:
        ValueError: the device or precision is not available here, or the ranks contradict each other.
        OSError: the other ranks cannot be reached, or some did not come.
    """
    ranks = find_ranks(os.environ, world_size, local_rank, dist_url)
    chosen = choose_device(device, ranks)
    precision = _choose_dtype(dtype, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves a product in float32
    if parallel != "ddp" and ranks.world_size > 1 and precision == torch.float16:
        raise ValueError(f"--parallel {parallel} computes in bf16 or fp32, not in fp16: choose one of them")
    mesh = host_group = watch = None
    if ranks.world_size > 1:
        timeout = timedelta(minutes=timeout_minutes)
        store = meet(ranks.meeting, ranks.rank, ranks.world_size, min(timeout, LONGEST_START))
        watch = Watch(store, ranks.rank, ranks.world_size, timeout)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=2 * timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
        if parallel != "ddp":
            mesh = make_mesh(chosen.type, ranks, parallel, 2 * timeout)
            host_group = dist.new_group(backend="gloo", timeout=2 * timeout)
    place = (ranks.rank, ranks.local_rank, ranks.world_size)
    return Runtime(chosen, precision, *place, mesh, host_group, watch)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of the module lists of `model`: the large parts that run one after another."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[nn.Module], object] = lambda unit: None,
) -> nn.Module:
    """Divide the parameters of `model` over the last dimension of `mesh`, in place (FSDP2).

    Args:
        model: on any device, the meta device too.
        mesh: one dimension (shards) or two (copies of the shards).
        dtype: what the blocks gather their parameters in; gradients are averaged in float32. What lies
            outside the blocks stays float32, as under autocast, and with it the sum that they add to. On
            CPUs, whose LayerNorm takes no mixture of types, all stays float32.
        prepare: called with each block, and at last with the model, before it is divided.
    """
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    on_cpu = mesh.device_type == "cpu"
    for unit in (*blocks_of(model), model):
        prepare(unit)
        fully_shard(unit, mesh=mesh, mp_policy=whole if on_cpu or unit is model else low)
        if on_cpu:  # before torch 2.9 gloo took a sum for a mean without a word
            unit.set_force_sum_reduction_for_comms(True)
    return model


def make_mesh(kind: str, ranks: "Ranks", parallel: str, timeout: timedelta | None = None) -> DeviceMesh:
    """The mesh of devices of a `kind` that `shard` needs: all ranks, or (machines, ranks of a machine).

    Args:
        timeout: of the exchanges within and between machines; those of all ranks have their own.

    Raises:
        ValueError: hybrid sharding over machines that run different numbers of processes, or whose processes
            are not numbered one machine after another.
    """
    if parallel == "fsdp":
        return init_device_mesh(kind, (ranks.world_size,), mesh_dim_names=("shard",))
    if not ranks.local_world_size or ranks.world_size % ranks.local_world_size:
        here = ranks.local_world_size or "an unknown number"
        raise ValueError(
            "--parallel hybrid needs the same number of processes on each machine, found "
            f"{ranks.world_size} in all and {here} on one: choose fsdp"
        )
    if ranks.rank % ranks.local_world_size != ranks.local_rank:
        raise ValueError(
            f"--parallel hybrid needs ranks numbered machine by machine, found rank {ranks.rank} as number "
            f"{ranks.local_rank} of {ranks.local_world_size} on its machine: start with --distribution=block"
        )
    machines = torch.arange(ranks.world_size).view(-1, ranks.local_world_size)
    groups = [
        dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0]
        for rows in (machines.T, machines)
    ]
    return DeviceMesh.from_group(groups, kind, machines, mesh_dim_names=("copy", "shard"))


class Ranks(NamedTuple):
    """This process's place in the run, and where the processes meet."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # the most processes any machine of the run holds; 0: the launcher did not say
    meeting: str | None = None
    one_gpu_each: bool = False  # each process is shown only its own GPU


def find_ranks(
    environ: Mapping[str, str],
    world_size: int | None = None,
    local_rank: int | None = None,
    dist_url: str | None = None,
) -> Ranks:
    """Ranks of this process, from `environ` and the arguments of `start_runtime`.

    Raises:
        ValueError: a rank outside its range, no meeting place, or arguments that contradict the launcher.
    """
    asked = world_size if world_size is not None and world_size > 1 else None
    dist_url = None if dist_url == "env://" else dist_url
    if "RANK" in environ and "WORLD_SIZE" in environ:
        size = int(environ["WORLD_SIZE"])
        ranks = Ranks(
            rank=int(environ["RANK"]),
            # Launchers that start one process per container set no local variables.
            local_rank=int(environ.get("LOCAL_RANK", 0)),
            world_size=size,
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", 0)),
            meeting=dist_url or _meeting_of(environ),
        )
    elif asked:
        if local_rank is None or local_rank < 0:
            raise ValueError(
                f"--world_size {asked} without a launcher needs --local_rank, 0 to {asked - 1}, for each "
                "process; or start the run with torchrun or srun"
            )
        if not dist_url and "MASTER_ADDR" not in environ:
            raise ValueError(
                f"--world_size {asked} needs a meeting place, the same for all: --dist_url tcp://127.0.0.1:29500"
            )
        ranks = Ranks(local_rank, local_rank, asked, asked, dist_url or _meeting_of(environ))
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


def _meeting_of(environ: Mapping[str, str]) -> str:
    """Where MASTER_ADDR and MASTER_PORT say; torchrun may hold there itself what the ranks share."""
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if not address or not port or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "env://"
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _slurm_ranks(environ: Mapping[str, str], dist_url: str | None) -> Ranks:
    """Ranks of one task of an srun step; the first machine of the step is where they meet."""
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
        meeting=dist_url or f"tcp://{host}:{port}",
        one_gpu_each="SLURM_GPUS_PER_TASK" in environ,
    )


def _port(*numbers: int) -> int:
    """A port that neighbouring numbers do not share, below the range from which systems hand out ports."""
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
        head, bracket, rest = item.partition("[")
        if not bracket:
            hosts.append(item)
            continue
        numbers, _, tail = rest.partition("]")
        tails = expand_node_list(tail) if tail else [""]
        for part in numbers.split(","):
            if not re.fullmatch(r"\d+(-\d+)?", part):
                raise ValueError(f"not a SLURM node list: {text!r}")
            low, _, high = part.partition("-")
            # Zeros in front of the first number say how many digits each has.
            hosts += [
                f"{head}{n:0{len(low)}d}{tail}"
                for n in range(int(low), int(high or low) + 1)
                for tail in tails
            ]
    return hosts


def choose_device(device: str, ranks: Ranks) -> torch.device:
    """The device of this process.

    Raises:
        ValueError: there is no such device here, or the ranks of a machine are more or fewer than its GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        if gpus:
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() and ranks.world_size == 1 else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"unknown device {device!r}: choose auto, cpu, cuda, cuda:N or mps")
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device mps is not available here: choose auto or cpu")
        if ranks.world_size > 1:
            raise ValueError(f"device mps runs one process, not {ranks.world_size}: choose cpu")
        return torch.device("mps")
    if not gpus:
        raise ValueError("device cuda was asked for, but torch sees no CUDA GPU here: choose auto or cpu")
    if index:
        if ranks.world_size > 1:
            raise ValueError(f"device {device} would be shared by {ranks.world_size} processes: choose cuda")
        if int(index) >= gpus:
            raise ValueError(f"device {device} does not exist: {gpus} GPUs are visible, numbered from 0")
        return torch.device(device)
    if ranks.one_gpu_each and gpus == 1:
        return torch.device("cuda:0")
    needed = max(ranks.local_world_size, ranks.local_rank + 1)
    if needed > gpus or (ranks.world_size > 1 and 0 < ranks.local_world_size < gpus):
        remedy = "choose cpu" if needed > gpus else "hide the others with CUDA_VISIBLE_DEVICES"
        raise ValueError(
            f"{needed} processes on a machine with {gpus} visible GPUs: start one for each, or {remedy}"
        )
    return torch.device("cuda", ranks.local_rank)


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch type `dtype` names, where `device` can compute in it."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose {', '.join(DTYPES)}")
    if dtype == "fp16" and device.type == "cpu":
        raise ValueError("fp16 needs a GPU: on a CPU choose bf16 or fp32")
    if (
        dtype == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic: choose fp16 or fp32 instead"
        )
    return DTYPES[dtype]
