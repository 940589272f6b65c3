"""What a training step needs: memory on each GPU for every way of dividing a model, and arithmetic per image.

No formula could drift away from the model: the model itself runs on fake tensors, which have shapes and no
content, while what it would keep for the backward pass and what it computes is counted. Not counted: what an
allocator wastes, and the few gradients of activations that live at once.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from pixio.engine.parallel import blocks_of
from pixio.engine.runtime import DTYPES, GIB
from pixio.models.mae import PixioMAE
from pixio.models.registry import create_model

USABLE = 0.9  # share of a GPU's memory that is planned with


@dataclass(frozen=True)
class Setting:
    """One way to run, and the bytes that it needs on the GPU that needs most.

    Attributes:
        flags: of the training programs.
        weights, gradients, optimizer: what stays between steps, or as long as a backward pass; float32.
        activations: kept from the forward pass for the backward pass.
        working: copies of weights in the type of the computation, and shards put together for a moment.
    """

    flags: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


@dataclass(frozen=True)
class Plan:
    """Settings from the fastest to the smallest, and the arithmetic of one image.

    Attributes:
        parameters: number of them.
        forward_flops: operations of a forward pass, per image; a multiplication and an addition are two.
        settings: to choose from.
    """

    parameters: int
    forward_flops: int
    settings: list[Setting]


@dataclass
class _Traced:
    """What a forward pass would do.

    saved: bytes kept for the backward pass, beside the weights and their copies. per_block: the part of it in
    each block, and the size of the block's input. flops: operations.
    """

    saved: int
    per_block: list[tuple[int, int]]
    flops: int


def make_plan(
    model: str,
    gpus: int,
    batch: int,
    dtype: str = "bf16",
    mask_ratio: float = 0.75,
    gpus_per_node: int = 8,
) -> Plan:
    """Plan the training of `model` on images of its native size.

    Args:
        model: any name of `pixio.list_models`: a pre-training model with masks, or an encoder without.
        gpus: number of GPUs, each with its own process.
        batch: images per GPU and forward pass.
        dtype: what autocast computes in, "bf16", "fp16" or "fp32".
        mask_ratio: share of masked cells in pre-training.
        gpus_per_node: of a machine, which --parallel hybrid divides the model over.

    Raises:
        ValueError: unknown model or dtype, or a number that is not positive.
    """
    for name, value in (("gpus", gpus), ("batch", batch), ("gpus_per_node", gpus_per_node)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, found {value}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose {', '.join(DTYPES)}")
    computed = DTYPES[dtype]
    with torch.device("meta"):
        network = create_model(model).train()
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    with FakeTensorMode() as fake:
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    network.load_state_dict(state, assign=True)
    with fake:
        traced = trace(network, batch, computed, mask_ratio)
    whole = 4 * sum(parameter.numel() for parameter in network.parameters())

    copies = weight_copies(network, computed)
    saved, inputs = zip(*traced.per_block, strict=True)
    recomputed = traced.saved - sum(saved) + sum(inputs) + max(saved)

    # Two blocks are whole at once, the next being fetched; one has whole gradients, which leave in float32.
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(network)]
    gathered = whole - 4 * sum(blocks) + max(blocks) * (3 * computed.itemsize + 4)

    held = [("ddp", whole, copies)]
    for parallel, ranks in (("hybrid", gpus_per_node), ("fsdp", gpus)):
        possible = 1 < ranks < gpus and gpus % ranks == 0 if parallel == "hybrid" else gpus > 1
        if possible:
            held.append((parallel, 4 * sum(shard_sizes(network, ranks)), gathered))
    settings = [
        Setting(f"--parallel {parallel}{flag}", each, each, 2 * each, activations, working)
        for parallel, each, working in held
        for flag, activations in (("", traced.saved), (" --grad_checkpointing", recomputed))
    ]
    return Plan(whole // 4, traced.flops // batch, settings)


def shard_sizes(model: nn.Module, ranks: int) -> list[int]:
    """Numbers that the first of `ranks` holds of each parameter: its share of the rows, rounded up."""
    parameters = list(model.parameters())
    return [math.ceil(len(parameter) / ranks) * parameter[0].numel() for parameter in parameters]


def weight_copies(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the matrices in the type of autocast, which keeps them until the backward pass."""
    if dtype == torch.float32:
        return 0
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(dtype.itemsize * layer.weight.numel() for layer in layers)


def trace(model: nn.Module, batch: int, dtype: torch.dtype, mask_ratio: float = 0.75) -> _Traced:
    """Run `model` forward once, on random images; in a fake mode nothing is computed."""
    mae = isinstance(model, PixioMAE)
    encoder = model.encoder if mae else model
    images = torch.rand(batch, encoder.in_chans, *encoder.img_size)
    per_block: list[tuple[int, int]] = []
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    # of attention older versions of torch know the count for GPUs only
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counts = {attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}
    with FlopCounterMode(display=False, custom_mapping=counts) as flops, _saved_bytes(weights) as saved:
        handles = [hook for block in blocks_of(model) for hook in _watch(block, saved, per_block, dtype)]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            output = model(images, mask_ratio) if mae else model(images, block_ids=[-1])
        total = saved() - weight_copies(model, dtype)
        del output
    for handle in handles:
        handle.remove()
    return _Traced(total, per_block, flops.get_total_flops())


@contextmanager
def _saved_bytes(weights: set[int]) -> Iterator[Callable[[], int]]:
    """Inside, a function that tells the bytes kept so far for a backward pass, those of `weights` apart."""
    sizes: dict[int, int] = {}
    alive = []  # so that no storage's place is used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            alive.append(storage)
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def _watch(
    block: nn.Module, saved: Callable[[], int], found: list[tuple[int, int]], dtype: torch.dtype
) -> list[RemovableHandle]:
    before, copies = [], weight_copies(block, dtype)

    def enter(_, inputs: tuple[Tensor, ...]) -> None:
        before.append(saved())

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((saved() - before.pop() - copies, inputs[0].nbytes))

    return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]


def describe(plan: Plan, gpu_memory: float) -> str:
    """A table of the settings, with what fits on GPUs of `gpu_memory` GiB, and which to take.

    Raises:
        ValueError: the memory is not positive.
    """
    if gpu_memory <= 0:
        raise ValueError(f"--gpu_memory must be positive, found {gpu_memory}")
    lines = [
        f"{plan.parameters:,} parameters; {plan.forward_flops / 1e9:,.1f} GFLOP per image forward, "
        f"{3 * plan.forward_flops / 1e9:,.1f} with the backward pass (4/3 of it with --grad_checkpointing)",
        f"{'GiB on the GPU that needs most':<38}{'weights':>9}{'gradients':>11}{'optimizer':>11}"
        f"{'activations':>13}{'working':>9}{'total':>8}",
    ]
    fits = [setting for setting in plan.settings if setting.total <= USABLE * gpu_memory * GIB]
    for setting in plan.settings:
        parts = (setting.weights, setting.gradients, setting.optimizer, setting.activations, setting.working)
        cells = [f"{part / GIB:>{width}.2f}" for part, width in zip(parts, (9, 11, 11, 13, 9), strict=True)]
        verdict = "fits" if setting in fits else "too large"
        lines.append(f"{setting.flags:<38}{''.join(cells)}{setting.total / GIB:>8.2f}  {verdict}")
    advice = (
        f"take {fits[0].flags}"
        if fits
        else "nothing fits: take more GPUs with fsdp, or a smaller --batch_size"
    )
    lines.append(f"{USABLE:.0%} of {gpu_memory:g} GiB: {advice}")
    return "\n".join(lines)
