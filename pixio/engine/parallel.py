"""A model on several ranks: a copy on each (DDP), or shards over all of them or those of a node (FSDP2)."""

import copy
import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from pixio.engine.ranks import Ranks

BACKEND = "inductor"  # of torch.compile
BUCKET_MB = 100  # of gradients that DDP exchanges at once; a block of ViT-H has 79
GRAPHS = 64  # of the blocks of a process, all models and sizes together; torch's 8 would refuse the ninth


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of the module lists of `model`: the large parts that run one after another."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward pass of each block as one graph, in place; blocks of one shape share theirs.

    Before activation checkpointing and before the model is copied or sharded, so that both stay outside of
    what is compiled. Sizes are constants: each different one, of images or widths, is a graph of its own.
    """
    torch._dynamo.config.optimize_ddp = False  # DDP's buckets are cut between blocks already
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward, backend=BACKEND, fullgraph=True, dynamic=False)


def checkpoint_activations(model: nn.Module, context_fn: Callable | None = None) -> None:
    """Let each block run again in the backward pass instead of keeping its activations, in place.

    Args:
        context_fn: of `torch.utils.checkpoint.checkpoint`: contexts of the two forward passes.
    """
    options = {"use_reentrant": False} | ({"context_fn": context_fn} if context_fn else {})
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, **options)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` with its parameters and buffers on the meta device: all but their values."""
    meta: dict[int, Any] = {id(tensor): tensor.to("meta") for tensor in model.buffers()}
    for tensor in model.parameters():
        meta[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
    return copy.deepcopy(model, meta)


def to_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Move `module`; what is on the meta device becomes memory for the values that rank 0 sends."""
    for part in module.modules():
        if any(t.is_meta for t in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
            part.to_empty(device=device, recurse=False)
    return module.to(device)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Collective: a copy of rank 0's `model` on every rank; gradients become the mean over ranks (DDP)."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return broadcast(model, device)  # DDP refuses a model without gradients
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        to_device(model, device), device_ids=device_ids, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB
    )


def broadcast(module: nn.Module, device: torch.device) -> nn.Module:
    """Collective: move `module` to the device with the values of rank 0, but for what is sharded already."""
    for tensor in (*to_device(module, device).parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), src=0)
    return module


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[nn.Module], object] = lambda module: None,
    keep_gathered: bool = False,
) -> nn.Module:
    """Shard the parameters of `model` over the last dimension of `mesh`, in place (FSDP2).

    Args:
        model: on any device, the meta device too.
        mesh: one dimension (shards) or two (copies of the shards).
        dtype: what the blocks gather their parameters in, those of their norms too, whose arithmetic autocast
            does in float32; gradients are averaged in float32. What lies outside the blocks stays float32, as
            under autocast, and with it the residual stream. On CPUs, whose LayerNorm takes no mixture of
            types, all stays float32.
        prepare: called with each block, and at last with the model, before it is sharded.
        keep_gathered: between its forward and its backward pass a block stays whole, in `dtype`: it is
            gathered once per step instead of twice.
    """
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    reshard = False if keep_gathered else None  # None: blocks are divided again, what lies outside is not
    on_cpu = mesh.device_type == "cpu"
    model.register_forward_hook(_copy_views)
    for module in (*blocks_of(model), model):
        prepare(module)
        policy = full if on_cpu or module is model else low
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        if on_cpu:  # before torch 2.9 gloo silently summed where the mean was asked for
            module.set_force_sum_reduction_for_comms(True)
    return model


def _copy_views(module: nn.Module, inputs: tuple, output: Any) -> Any:
    """What `module` returned; views are copied, as writing into one would lose FSDP's hook on it."""
    return tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad and t._is_view() else t, output)


def make_mesh(device_type: str, ranks: Ranks, parallel: str, timeout: timedelta | None = None) -> DeviceMesh:
    """The device mesh that `shard` needs: all ranks, or (nodes, ranks of a node).

    Args:
        device_type: "cuda" or "cpu".
        parallel: "fsdp" or "hybrid".
        timeout: of the collectives within and between nodes; those of all ranks have their own.

    Raises:
        ValueError: hybrid sharding over nodes that run different numbers of processes, or whose processes
            are not numbered one node after another.
    """
    if parallel == "fsdp":
        return init_device_mesh(device_type, (ranks.world_size,), mesh_dim_names=("shard",))
    if not ranks.local_world_size or ranks.world_size % ranks.local_world_size:
        here = ranks.local_world_size or "an unknown number"
        raise ValueError(
            "--parallel hybrid needs the same number of processes on each node, found "
            f"{ranks.world_size} in all and {here} on one: choose fsdp"
        )
    if ranks.rank % ranks.local_world_size != ranks.local_rank:
        raise ValueError(
            f"--parallel hybrid needs ranks numbered node by node, found rank {ranks.rank} as number "
            f"{ranks.local_rank} of {ranks.local_world_size} on its node: start with --distribution=block"
        )
    nodes = torch.arange(ranks.world_size).view(-1, ranks.local_world_size)  # [nodes, ranks of a node]
    groups = [
        dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0] for rows in (nodes.T, nodes)
    ]
    return DeviceMesh.from_group(groups, device_type, nodes, mesh_dim_names=("copy", "shard"))
