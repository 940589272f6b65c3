"""Sliding-window prediction in batches against one window after another: the same predictions, in less time.

    python benchmarks/windows.py [--encoder pixio_vitb16] [--height 426 --width 560] [--window_batch 16]

Both sides take turns in one run, on the same encoder, head and image, on the GPU if there is one; printed are
the median times, the median of the ratios and the largest difference between the two predictions.
"""

import statistics
from dataclasses import dataclass
from typing import Literal

import torch
from timing import now

from pixio.dense import FrozenEncoder, head_blocks, make_head, slide
from pixio.engine.config import option, parse
from pixio.engine.runtime import start_runtime
from pixio.models.external import depth_of, load_encoder


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time batched against single windows. The defaults are an image of NYUv2."""

    encoder: str = option("pixio_vitb16", "pixio_… or timm/NAME, with random weights")
    head: Literal["linear", "dpt"] = option("linear", "kind of head")
    height: int = option(426, "of the image, pixels", ge=1)
    width: int = option(560, "of the image, pixels", ge=1)
    size: int = option(256, "side of a window, pixels", ge=1)
    window_batch: int = option(16, "windows in a batch", ge=1)
    repeats: int = option(5, "measurements of either side", ge=1)
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: Literal["bf16", "fp16", "fp32"] = option("fp32", "what autocast computes in")


@torch.inference_mode()
def measure(config: BenchmarkConfig) -> None:
    """Time both sides in turn and print what was found."""
    runtime = start_runtime(config.device, config.dtype)
    torch.manual_seed(0)
    encoder = load_encoder(config.encoder)
    frozen = FrozenEncoder(encoder, head_blocks(config.head, depth_of(encoder))).to(runtime.device)
    head = make_head(config.head, frozen.channels, 1, runtime).to(runtime.device).eval()
    image = torch.randn(3, config.height, config.width, device=runtime.device)

    def predict(windows: torch.Tensor) -> torch.Tensor:
        with runtime.autocast():
            return head(frozen(windows), windows.shape[-2:])

    def timed(window_batch: int) -> tuple[float, torch.Tensor]:
        began = now()
        prediction = slide(predict, image, config.size, int(config.size * 2 / 3), window_batch)
        return now() - began, prediction

    timed(1), timed(config.window_batch)  # allocations and kernels of the first call
    single, batched, difference = [], [], 0.0
    for _ in range(config.repeats):
        (slow, one_by_one), (fast, together) = timed(1), timed(config.window_batch)
        single.append(slow)
        batched.append(fast)
        difference = max(difference, (one_by_one - together).abs().max().item())
    ratio = statistics.median(slow / fast for slow, fast in zip(single, batched, strict=True))
    print(
        f"{config.encoder}, {config.head} head, {config.height} x {config.width}, {config.dtype} on "
        f"{runtime.device}, {torch.get_num_threads()} threads: one by one {statistics.median(single):.3f} s, "
        f"batches of {config.window_batch} {statistics.median(batched):.3f} s, {ratio:.2f}x; "
        f"largest difference {difference:.1e}"
    )


if __name__ == "__main__":
    measure(parse(BenchmarkConfig))
