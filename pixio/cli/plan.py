"""What training needs: memory on each GPU for every way of dividing models, arithmetic per image, GPU-hours.

No formula could drift away from the model: the model itself runs on fake tensors, which have shapes and no
content, while what it would keep for the backward pass and what it computes is counted. Not counted: what an
allocator wastes, and the few gradients of activations that live at once.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from pixio.engine.parallel import blocks_of
from pixio.engine.runtime import DTYPES, GIB
from pixio.models.encoder import PixioViT
from pixio.models.mae import PixioMAE
from pixio.models.masking import count_kept
from pixio.models.registry import create_model

USABLE = 0.9  # share of a GPU's memory that is planned with
# Memory in GiB, and 10^12 operations per second on dense matrices in bf16 (data sheets of NVIDIA).
CARDS = {
    "a100": (80, 312),
    "h100": (80, 989),
    "h200": (140, 989),
    "b200": (179, 2250),
    "l40s": (45, 362),
    "rtx3090": (24, 71),
    "rtx4090": (24, 165),
}


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
        parameters: number of them that are trained.
        forward_flops: operations of a forward pass, per image; a multiplication and an addition are two.
        teacher_flops: those of a teacher, beside them.
        settings: to choose from.
    """

    parameters: int
    forward_flops: int
    teacher_flops: int
    settings: list[Setting]

    @property
    def step_flops(self) -> int:
        """Operations of a step, per image; a backward pass takes twice those of its forward pass."""
        return 3 * self.forward_flops + self.teacher_flops


@dataclass
class _Traced:
    """What a forward pass would do.

    saved: bytes kept for the backward pass, beside the weights and their copies. per_block: the part of it in
    each block, and the size of the block's input. flops: operations.
    """

    saved: int
    per_block: list[tuple[int, int]]
    flops: int


@dataclass(frozen=True)
class Cost:
    """What a run takes at a stated share of a card's arithmetic.

    Attributes:
        seconds: of a step.
        images_per_second: of all GPUs.
        hours: of the run; times the GPUs, what is paid for. None where its length is not known.
    """

    seconds: float
    images_per_second: float
    hours: float | None


def make_plan(
    models: str | Sequence[str],
    gpus: int,
    batch: int,
    dtype: str = "bf16",
    mask_ratio: float | None = None,
    gpus_per_node: int = 8,
    teacher: str | None = None,
) -> Plan:
    """Plan the training of a model, or of several students side by side, on images of their native size.

    Args:
        models: any names of `pixio.list_models`: pre-training models, or encoders.
        gpus: number of GPUs, each with its own process.
        batch: images per GPU and forward pass.
        dtype: what autocast computes in, "bf16", "fp16" or "fp32".
        mask_ratio: share of masked cells (of 4 x 4 patches); by default 0.75 of a pre-training model, else 0.
        gpus_per_node: of a machine, which --parallel hybrid divides the model over.
        teacher: encoder of a distillation, frozen, held in `dtype`; it sees whole images.

    Raises:
        ValueError: unknown model or dtype, or a number that is not positive.
    """
    for name, value in (("gpus", gpus), ("batch", batch), ("gpus_per_node", gpus_per_node)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, found {value}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose {', '.join(DTYPES)}")
    models = (models,) if isinstance(models, str) else models
    plans = [_plan_one(model, gpus, batch, DTYPES[dtype], mask_ratio, gpus_per_node) for model in models]
    taught = _plan_one(teacher, gpus, batch, DTYPES[dtype], 0.0, gpus_per_node) if teacher else None
    settings = []
    for position, same in enumerate(zip(*(plan.settings for plan in plans), strict=True)):
        held = [sum(getattr(s, part) for s in same) for part in ("weights", "gradients", "optimizer")]
        if taught:
            held[0] += taught.settings[position].weights * DTYPES[dtype].itemsize // 4
        # Students take turns: only one has activations.
        most = [max(getattr(s, part) for s in same) for part in ("activations", "working")]
        settings.append(Setting(same[0].flags, *held, *most))
    return Plan(
        sum(plan.parameters for plan in plans),
        sum(plan.forward_flops for plan in plans),
        taught.forward_flops if taught else 0,
        settings,
    )


def cost_of(
    plan: Plan, card: str, mfu: float, gpus: int, batch: int, accum: int = 1, steps: int | None = None
) -> Cost:
    """What the run of a plan takes.

    Args:
        plan: of these `gpus` and `batch`, in half precision.
        card: one of `CARDS`.
        mfu: share of the card's arithmetic that the model gets (model FLOPs utilization, of PaLM), in (0, 1].
        gpus: number of GPUs.
        batch: images per GPU and forward pass.
        accum: forward passes per step.
        steps: of the run.
    """
    images = batch * accum
    seconds = images * plan.step_flops / (1e12 * CARDS[card][1] * mfu)
    return Cost(seconds, gpus * images / seconds, steps and steps * seconds / 3600)


@functools.cache
def _plan_one(
    model: str, gpus: int, batch: int, dtype: torch.dtype, mask_ratio: float | None, gpus_per_node: int
) -> Plan:
    """The plan of one model, trained."""
    with torch.device("meta"):
        network = create_model(model).train()
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    with FakeTensorMode() as fake:
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    network.load_state_dict(state, assign=True)
    with fake:
        traced = trace(network, batch, dtype, mask_ratio)
    whole = 4 * sum(parameter.numel() for parameter in network.parameters())

    copies = weight_copies(network, dtype)
    saved, inputs = zip(*traced.per_block, strict=True)
    recomputed = traced.saved - sum(saved) + sum(inputs) + max(saved)

    # Two blocks are whole at once, the next being fetched; one has whole gradients, which leave in float32.
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(network)]
    gathered = whole - 4 * sum(blocks) + max(blocks) * (3 * dtype.itemsize + 4)

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
    return Plan(whole // 4, traced.flops // batch, 0, settings)


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


def trace(model: nn.Module, batch: int, dtype: torch.dtype, mask_ratio: float | None = None) -> _Traced:
    """Run `model` forward once, on random images; in a fake mode nothing is computed. See `make_plan`."""
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
            if mae:
                output = model(images, 0.75 if mask_ratio is None else mask_ratio)
            else:
                output = model(images, block_ids=[-1], ids_keep=_visible(encoder, batch, mask_ratio))
        total = saved() - weight_copies(model, dtype)
        del output
    for handle in handles:
        handle.remove()
    return _Traced(total, per_block, flops.get_total_flops())


def _visible(encoder: PixioViT, batch: int, mask_ratio: float | None) -> Tensor | None:
    """As many patches as masks of cells of 4 x 4 leave, [B, V]."""
    if not mask_ratio:
        return None
    cells = math.prod(encoder.grid) // 16
    return torch.zeros(batch, 16 * count_kept(cells, mask_ratio), dtype=torch.int64)


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
    teacher = f", {plan.teacher_flops / 1e9:,.1f} of them the teacher's" if plan.teacher_flops else ""
    lines = [
        f"{plan.parameters:,} parameters; {plan.forward_flops / 1e9:,.1f} GFLOP per image forward, "
        f"{plan.step_flops / 1e9:,.1f} with the backward pass{teacher} (a third more with "
        "--grad_checkpointing)",
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


def describe_cost(cost: Cost, card: str, mfu: float, gpus: int) -> str:
    """One line: time of a step, images per second, and hours where the run's length is known."""
    text = (
        f"at {mfu:.0%} MFU on {gpus} x {card}: {cost.seconds:.3g} s per step, "
        f"{cost.images_per_second:,.0f} images/s"
    )
    if cost.hours is not None:
        text += f"; the run takes {cost.hours:,.3g} hours, {gpus * cost.hours:,.0f} GPU-hours"
    return text
