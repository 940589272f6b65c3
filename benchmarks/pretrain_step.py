"""Images per second and MFU of a pre-training step: ours, eager and compiled, against a plain loop.

    python benchmarks/pretrain_step.py --model pixio_vith16_enc1280x32h16_dec512x32h16 --batch_size 64

The plain loop is MAE's (https://github.com/facebookresearch/mae), written here: float32 batches, autocast, a
loss read from the device in every step, AdamW as it comes, and the same model. Ours is `main_pretrain.py`'s:
uint8 batches that the device normalizes, `accumulate`, fused AdamW. The ways take turns, on the GPU if there
is one; printed are medians. MFU counts the operations that `pixio plan` counts, three times those of the
forward pass, against the data sheet of the GPU; elsewhere against the speed of a large matrix product.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from timing import now
from torch import Tensor, nn

import pixio
from pixio.cli.plan import CARDS, make_plan
from pixio.engine.config import option, parse
from pixio.engine.optim import make_adamw
from pixio.engine.runtime import Runtime, start_runtime
from pixio.engine.step import accumulate
from pixio.images.normalization import IMAGENET_MEAN, IMAGENET_STD, normalize

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time pre-training steps."""

    model: str = option("pixio_vits16_enc384x12h6_dec256x4h8", "pre-training model, see `pixio info`")
    batch_size: int = option(64, "images per step", ge=1)
    steps: int = option(10, "steps per measurement", ge=1)
    rounds: int = option(3, "measurements of each variant", ge=1)
    ways: tuple[Literal["plain", "eager", "compiled"], ...] = option(
        ("plain", "eager", "compiled"), "variants to measure"
    )
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", "autocast dtype")


def plain_way(config: BenchmarkConfig, runtime: Runtime, pixels: Tensor) -> Step:
    """A step as a short script writes it."""
    model = build(config).to(runtime.device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    batch = (pixels / 255 - mean) / std  # by the workers of its loader
    batch = batch.pin_memory() if runtime.pins_memory else batch

    def step() -> Tensor:
        images = batch.to(runtime.device, non_blocking=True)
        with torch.autocast(runtime.device.type, runtime.dtype, enabled=runtime.dtype != torch.float32):
            loss = model(images, 0.75).loss
        if not math.isfinite(loss.item()):
            sys.exit(f"the loss is {loss.item()}")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def our_way(config: BenchmarkConfig, runtime: Runtime, pixels: Tensor, compile: bool) -> Step:
    """A step of `main_pretrain.py`."""
    mae = build(config)
    model = runtime.wrap(mae, compile=compile)
    optimizer = make_adamw(mae, 1e-4)
    scaler = runtime.make_scaler()
    pixels = pixels.pin_memory() if runtime.pins_memory else pixels

    def loss_fn(model: nn.Module, pixels: Tensor) -> Tensor:
        return model(normalize(pixels.to(runtime.device, non_blocking=True)), 0.75).loss

    return lambda: accumulate(runtime, model, optimizer, scaler, [pixels], loss_fn).loss


def build(config: BenchmarkConfig) -> nn.Module:
    """The model, with the same weights each time."""
    torch.manual_seed(0)
    return pixio.create_model(config.model).train()


def peak_of(runtime: Runtime) -> tuple[float, str]:
    """Operations per second that 100 % MFU stands for, and where they come from."""
    name = runtime.device_name
    for card, (_, tflops) in CARDS.items():
        if card in name.lower().replace(" ", "") and runtime.dtype != torch.float32:
            return 1e12 * tflops, f"data sheet of {name}"
    side = 1024 if runtime.device.type == "cpu" else 4096
    a = torch.randn(side, side, device=runtime.device, dtype=runtime.dtype)
    times = []
    for _ in range(10):
        began = now()
        a @ a
        times.append(now() - began)
    return 2 * side**3 / min(times), f"a product of {side} x {side} matrices"


def measure(config: BenchmarkConfig) -> None:
    """Time all ways in turn and print what was found."""
    runtime = start_runtime(config.device, config.dtype)
    random = torch.Generator().manual_seed(0)
    shape = (config.batch_size, 3, 256, 256)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    makers = {
        "plain": lambda: plain_way(config, runtime, pixels),
        "eager": lambda: our_way(config, runtime, pixels, compile=False),
        "compiled": lambda: our_way(config, runtime, pixels, compile=True),
    }
    ways, first, seconds = {}, {}, {}
    for name in config.ways:
        ways[name], seconds[name] = makers[name](), []
        torch.manual_seed(1)
        first[name] = ways[name]().item()  # compiles
        ways[name]()
    for _ in range(config.rounds):
        for name, step in ways.items():
            began = now()
            for _ in range(config.steps):
                step()
            seconds[name].append((now() - began) / config.steps)

    peak, source = peak_of(runtime)
    flops = config.batch_size * make_plan(config.model, 1, config.batch_size, config.dtype).step_flops
    print(f"{config.model}, {config.batch_size} images, {runtime.dtype} on {runtime.device}")
    print(f"100 % MFU is {peak / 1e12:.3g} TFLOP/s ({source})")
    print(f"{'':<10}{'s/step':>9}{'images/s':>10}{'MFU':>7}{'first loss':>12}")
    for name, times in seconds.items():
        each = statistics.median(times)
        speed, mfu = config.batch_size / each, flops / each / peak
        print(f"{name:<10}{each:>9.4f}{speed:>10.1f}{mfu:>7.1%}{first[name]:>12.5f}")


if __name__ == "__main__":
    measure(parse(BenchmarkConfig))
