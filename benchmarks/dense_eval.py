"""Crops per second of head training and images per second of sliding windows, each against the plain way.

    PYTHONPATH=evaluation python benchmarks/dense_eval.py [--encoder pixio_vitb16] [--head dpt]

The plain way trains on one batch after another, as many processes would each on its own GPU, and predicts one
window after another. Ours puts the batches of a step, and as many windows as --window_batch, through the
models at once. Both sides take turns in one run, on the same encoder, head and pixels in memory, on a GPU if
there is one; printed are medians, and how far losses and predictions of the two sides are apart (losses: the
BatchNorm of a head sees one batch on the plain side, and a whole step on ours, as the recipes want it).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from monodepth.metrics import silog_loss
from timing import now
from torch import Tensor

from pixio.dense import FrozenEncoder, head_blocks, make_head, slide
from pixio.engine.config import option, parse
from pixio.engine.runtime import Runtime, start_runtime
from pixio.engine.step import accumulate
from pixio.images.normalization import normalize
from pixio.models.external import depth_of, load_encoder


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time head training and sliding windows. The defaults are those of depth on NYUv2."""

    encoder: str = option("pixio_vitb16", "pixio_… or timm/NAME, with random weights")
    head: Literal["linear", "dpt"] = option("linear", "kind of head")
    batch_size: int = option(4, "crops per batch", ge=1)
    batches_per_step: int = option(8, "batches per step", ge=1)
    height: int = option(426, "height of the image, pixels", ge=1)
    width: int = option(560, "width of the image, pixels", ge=1)
    size: int = option(256, "side of a crop and of a window, pixels", ge=1)
    window_batch: int = option(16, "windows in a batch", ge=1)
    repeats: int = option(5, "measurements of each side", ge=1)
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: Literal["bf16", "fp16", "fp32"] = option("fp32", "autocast dtype")


def train_ways(config: BenchmarkConfig, runtime: Runtime) -> tuple[Callable[[], float], Callable[[], float]]:
    """A training step, plain and ours; each returns its loss."""
    count = config.batch_size * config.batches_per_step
    pixels = torch.randint(0, 256, (count, 3, config.size, config.size), dtype=torch.uint8)
    depth = 0.5 + 9 * torch.rand(count, config.size, config.size)

    def build() -> tuple[FrozenEncoder, torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        encoder = load_encoder(config.encoder)
        frozen = FrozenEncoder(encoder, head_blocks(config.head, depth_of(encoder))).to(runtime.device)
        head = make_head(config.head, frozen.channels, 1, runtime).to(runtime.device)
        return frozen, head, torch.optim.AdamW(head.parameters(), lr=1e-4)

    def loss_of(frozen: FrozenEncoder, head: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images = normalize(batch[0].to(runtime.device, non_blocking=True))
        targets = batch[1].to(runtime.device, non_blocking=True)
        logits = head(frozen(images), images.shape[-2:])
        parts = zip(logits.split(config.batch_size), targets.split(config.batch_size), strict=True)
        losses = [silog_loss(10 * part[:, 0].sigmoid(), target, 1e-3, 10) for part, target in parts]
        return torch.stack(losses).mean()

    def way(micro_batches: list[tuple[Tensor, Tensor]]) -> Callable[[], float]:
        frozen, head, optimizer = build()
        scaler = runtime.make_scaler()

        def step() -> float:
            loss = accumulate(
                runtime,
                head,
                optimizer,
                scaler,
                micro_batches,
                lambda model, batch: loss_of(frozen, model, batch),
            ).loss
            return loss.item()

        return step

    plain = list(zip(pixels.split(config.batch_size), depth.split(config.batch_size), strict=True))
    return way(plain), way([(pixels, depth)])


def window_ways(
    config: BenchmarkConfig, runtime: Runtime
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The prediction for an image, plain and ours."""
    torch.manual_seed(0)
    encoder = load_encoder(config.encoder)
    frozen = FrozenEncoder(encoder, head_blocks(config.head, depth_of(encoder))).to(runtime.device)
    head = make_head(config.head, frozen.channels, 1, runtime).to(runtime.device).eval()
    image = torch.randn(3, config.height, config.width, device=runtime.device)

    def predict(windows: Tensor) -> Tensor:
        with runtime.autocast():
            return head(frozen(windows), windows.shape[-2:])

    @torch.inference_mode()
    def slide_in(window_batch: int) -> Tensor:
        return slide(predict, image, config.size, int(config.size * 2 / 3), window_batch)

    return lambda: slide_in(1), lambda: slide_in(config.window_batch)


def compare(what: str, items: int, ways: tuple[Callable, Callable], repeats: int) -> None:
    """Time plain and ours in turn and print what was found."""
    seconds: list[list[float]] = [[], []]
    apart = 0.0
    for repeat in range(1 + repeats):
        found = []
        for way, times in zip(ways, seconds, strict=True):
            began = now()
            found.append(torch.as_tensor(way()))
            if repeat:  # the first makes allocations and chooses kernels
                times.append(now() - began)
        apart = max(apart, (found[0] - found[1]).abs().max().item())
    plain, ours = (items / statistics.median(times) for times in seconds)
    print(f"{what}: plain {plain:.2f}, ours {ours:.2f}, {ours / plain:.2f}x; at most {apart:.1e} apart")


def main(config: BenchmarkConfig) -> None:
    runtime = start_runtime(config.device, config.dtype)
    print(
        f"{config.encoder}, {config.head} head, {config.dtype} on {runtime.device}, "
        f"{torch.get_num_threads()} threads, {config.size} pixels"
    )
    crops = config.batch_size * config.batches_per_step
    compare("head training, crops/s", crops, train_ways(config, runtime), config.repeats)
    name = f"windows of {config.height} x {config.width}, images/s"
    compare(name, 1, window_ways(config, runtime), config.repeats)


if __name__ == "__main__":
    main(parse(BenchmarkConfig))
