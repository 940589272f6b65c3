"""The one place that chooses device and precision: from here laptop, torchrun and SLURM look alike.

Everything else in the project asks a `Runtime` and never an environment variable or a device library.
"""

import contextlib
import functools
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixio.engine import signals
from pixio.engine.parallel import (
    broadcast,
    checkpoint_activations,
    compile_blocks,
    make_mesh,
    replicate,
    shard,
    skeleton,
)
from pixio.engine.ranks import Collectives, Ranks, find_ranks, join_ranks

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GIB = 2**30
GATHERED = 1 / 16  # of a GPU's memory, for what blocks in shards gather and keep until the backward pass


@dataclass(frozen=True)
class Runtime(Collectives):
    """One process of a run: its device, the precision it computes in, and its place among the ranks.

    Attributes:
        dtype: what autocast computes in.
        mesh: the ranks that share one sharded copy of each model (its last dimension); None: each rank has a
            copy of its own.
        host_group: all ranks, for exchange between hosts beside what the devices exchange; with a mesh only.
    """

    dtype: torch.dtype = torch.float32
    _: KW_ONLY
    mesh: DeviceMesh | None = None
    host_group: dist.ProcessGroup | None = None

    @property
    def _on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def device_name(self) -> str:
        """The GPU's name, such as "NVIDIA H100 80GB HBM3"; of other devices their kind."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

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
                if self._on_cpu and torch.is_grad_enabled():
                    # torch's fused attention is slow backwards on CPUs in half precision
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    def to_host(self, tensor: Tensor) -> Callable[[], list]:
        """Start copying `tensor` to the host; the function returned waits for it and gives its numbers."""
        if self.device.type != "cuda":
            return tensor.tolist
        copy = tensor.to("cpu", non_blocking=True)  # in pinned memory
        arrived = torch.cuda.Event()
        arrived.record()

        def read() -> list:
            arrived.synchronize()
            return copy.tolist()

        return read

    def copy_ahead(self, batches: list[dict[str, Tensor]]) -> Callable[[], list[dict[str, Tensor]]]:
        """Start copying batches to the device, beside what it computes; the function returned gives them.

        Copies from pinned memory wait for nothing, nor does that function.
        """
        stream = _copy_stream() if self.device.type == "cuda" else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            moved = [
                {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
                for batch in batches
            ]

        def take() -> list[dict[str, Tensor]]:
            if stream:
                computing = torch.cuda.current_stream()
                computing.wait_stream(stream)
                for tensor in (tensor for batch in moved for tensor in batch.values()):
                    tensor.record_stream(computing)  # its memory belongs to the other stream
            return moved

        return take

    def make_scaler(self) -> torch.amp.GradScaler:
        """Gradient scaler: active in fp16, whose range is too small for gradients, transparent otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def seed(self, seed: int, step: int, part: str = "") -> None:
        """Make torch's random numbers a pure function of (seed, step, rank, part): no generator needs saving.

        Named parts of a step draw the same numbers whatever the other parts draw.
        """
        text = f"{seed}/{step}/{self.rank}{part and '/'}{part}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True))

    def build(self, function: Callable[[], nn.Module], whole: bool = False) -> nn.Module:
        """Collective: the model that `function()` gives on rank 0, the only one that calls it.

        The others hold it on the meta device until `wrap` sends the weights, so that memory of the host and
        start time do not grow with the ranks of a node. One process calls `function` and no more.

        Args:
            function: builds and loads.
            whole: send all weights now, for a model that is not wrapped.

        Raises:
            ValueError: on every rank, when `function` fails.
        """
        if self.world_size == 1:
            return function()
        model = self.agree(lambda: function() if self.is_main else None)
        shared = [skeleton(model) if self.is_main else None]
        dist.broadcast_object_list(shared, src=0)
        model = model if self.is_main else shared[0]
        return broadcast(model, self.device) if whole else model

    def wrap(
        self, model: nn.Module, activation_checkpointing: bool = False, compile: bool | None = False
    ) -> nn.Module:
        """Move `model` to the device, with rank 0's weights; its gradients become the mean over ranks.

        Only parameters that require a gradient now take part: wrap again after freezing or unfreezing some.
        With a mesh the parameters of `model` itself become shards (so make the optimizer afterwards).

        Args:
            model: its blocks, the members of its module lists, are compiled, checkpointed and sharded one by
                one.
            activation_checkpointing: run each block again in the backward pass instead of keeping its
                activations.
            compile: the blocks, with torch.compile; None: on a GPU, where a compiler is found.

        Raises:
            ValueError: `compile` is True, and there is no compiler.
        """
        if self._compiles(compile):
            compile_blocks(model)
        if activation_checkpointing:
            # The second pass restores autocast by itself, but not the attention kernels chosen on CPUs.
            contexts = (lambda: (contextlib.nullcontext(), self.autocast())) if self._on_cpu else None
            checkpoint_activations(model, contexts)
        if self.mesh is not None:
            prepare = functools.partial(broadcast, device=self.device)
            return shard(model, self.mesh, self.dtype, prepare, self._fits_whole(model))
        return replicate(model, self.device) if self.world_size > 1 else model.to(self.device)

    def _fits_whole(self, model: nn.Module) -> bool:
        """Whether all of `model` in `dtype` takes a small part of the device's memory."""
        if self.device.type != "cuda":
            return False
        size = self.dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
        return size <= GATHERED * torch.cuda.get_device_properties(self.device).total_memory

    def _compiles(self, wanted: bool | None) -> bool:
        """Whether to compile; tries it with one addition, so that what it lacks is said before training."""
        if wanted is False or (wanted is None and self.device.type != "cuda"):
            return False
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device=self.device))
        except Exception as error:  # each backend has its own
            reason = str(error).strip().partition("\n")[0]
            if wanted is None:
                if self.is_main:
                    warnings.warn(f"the blocks are not compiled, which costs speed: {reason}", stacklevel=3)
                return False
            remedy = "install a C++ compiler such as g++, or leave --compile out"
            raise ValueError(f"--compile does not work here ({reason}): {remedy}") from error
        return True

    def memory(self) -> float:
        """Peak memory in GiB: allocated by torch on a GPU, resident in this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GIB
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory() / GIB
        import resource  # not on every system that has a GPU

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # bytes there, KiB on Linux


def start_runtime(
    device: str = "auto",
    dtype: str = "bf16",
    world_size: int | None = None,
    local_rank: int | None = None,
    dist_url: str | None = None,
    parallel: Literal["ddp", "fsdp", "hybrid"] = "ddp",
    timeout_minutes: float = 30.0,
    port: int | None = None,
    deterministic: bool = False,
) -> Runtime:
    """Find this process's ranks, choose its device and precision, and join the other ranks.

    Ranks come from torchrun's variables, else from the arguments, else from mpirun or an srun step; else
    there is one.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".
        dtype: what autocast computes in, "bf16", "fp16" or "fp32" (no autocast). Weights are always float32.
            On a CPU without bf16 instructions bf16 becomes fp32, with a warning.
        world_size: processes, all on this node, of a run started by hand; None or 1: the launcher knows.
        local_rank: which of them this is; None or -1: the launcher knows.
        dist_url: address of the rendezvous, as "tcp://127.0.0.1:29500"; None or "env://": MASTER_ADDR and
            MASTER_PORT.
        parallel: what `Runtime.wrap` does with a model: a copy on every rank (ddp), shards over all ranks
            (fsdp), or shards over the ranks of a node and a copy on every node (hybrid).
        timeout_minutes: how long ranks wait for another, or for its GPU, before all end with a message that
            names it; where it cannot be told who is missing, torch ends them after twice this time.
        port: of the rendezvous, where neither `dist_url` nor MASTER_PORT says it.
        deterministic: let this process compute with kernels that give the same bits each time, where torch
            has some; an operation without one raises RuntimeError.

    Raises:
        ValueError: the device or precision is not available here, or the ranks contradict each other.
        OSError: the other ranks cannot be reached, or some did not come.
    """
    signals.end_workers_with_this_process()
    if deterministic:
        _be_deterministic()
    ranks = find_ranks(os.environ, world_size, local_rank, dist_url, port)
    chosen = choose_device(device, ranks)
    precision = _choose_dtype(dtype, chosen)
    if chosen.type == "cuda":
        if parallel != "ddp":
            # what FSDP gathers and frees would leave gaps; read when memory is first asked for
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves a product in float32
    if ranks.world_size == 1:
        return Runtime(chosen, precision)
    if parallel != "ddp" and precision == torch.float16:
        raise ValueError(f"--parallel {parallel} computes in bf16 or fp32, not in fp16: choose one of them")
    timeout = timedelta(minutes=timeout_minutes)
    watchdog = join_ranks(ranks, chosen, timeout)
    mesh = host_group = None
    if parallel != "ddp":
        mesh = make_mesh(chosen.type, ranks, parallel, 2 * timeout)
        host_group = dist.new_group(backend="gloo", timeout=2 * timeout)
    return Runtime(
        chosen,
        precision,
        rank=ranks.rank,
        world_size=ranks.world_size,
        watchdog=watchdog,
        mesh=mesh,
        host_group=host_group,
    )


def _be_deterministic() -> None:
    """Take kernels that sum in a fixed order, and choose none by timing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU computes its first product
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # read when something is first compiled
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nobody reads it


def place_frozen(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a model that does not learn to `device`, in place.

    Its linear and convolution weights are held in `dtype`, into which autocast would convert them at every
    use: the same results, in half the memory. Norms stay float32, and with them the residual stream.
    """
    for module in model.requires_grad_(False).modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(device, dtype)
    return model.to(device)


@functools.cache
def _copy_stream() -> "torch.cuda.Stream":
    """Of this process's GPU, for copies to it."""
    return torch.cuda.Stream()


def choose_device(device: str, ranks: Ranks) -> torch.device:
    """The device of this process.

    Raises:
        ValueError: there is no such device here, or a node runs more or fewer processes than it has GPUs.
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
        raise ValueError("device cuda was requested, but torch finds no CUDA GPU here: choose auto or cpu")
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
            f"{needed} processes on a node with {gpus} visible GPUs: start one per GPU, or {remedy}"
        )
    return torch.device("cuda", ranks.local_rank)


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch type `dtype` names, where `device` can compute in it."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose {', '.join(DTYPES)}")
    if dtype == "fp16" and device.type == "cpu":
        raise ValueError("fp16 needs a GPU: on a CPU choose bf16 or fp32")
    if dtype == "bf16" and device.type == "cpu" and not _cpu_computes_bf16():
        warnings.warn("this CPU has no bf16 arithmetic: computing in float32", stacklevel=3)
        return torch.float32
    on_gpu = device.type == "cuda"
    if dtype == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic: choose fp16 or fp32")
    return DTYPES[dtype]


def _cpu_computes_bf16() -> bool:
    """Whether matrix products have bf16 instructions here; torch emulates them in a loop otherwise."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def describe_devices() -> list[str]:
    """What this node computes on, one line for each GPU, or one for the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines = []
    for index in range(gpus):
        found = torch.cuda.get_device_properties(index)
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = "bf16" if able else "no bf16: use --dtype fp16"
        lines.append(f"cuda:{index}: {found.name}, {found.total_memory / GIB:.0f} GiB, {bf16}")
    if torch.backends.mps.is_available():
        lines.append("mps")
    bf16 = "bf16" if _cpu_computes_bf16() else "no bf16 arithmetic: computes in float32"
    cpu = f"cpu: {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {bf16}"
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return lines or [f"{cpu}; no GPU (torch is built {built})"]
