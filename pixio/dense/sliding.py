"""Predictions for images of any size, from overlapping square windows.

Letters: H x W pixels of the image, S side of a window, O outputs, n windows of a batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixio.images.normalization import normalize


def slide(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    size: int,
    stride: int,
    window_batch: int,
    decide: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Predict every window and average where windows overlap.

    Windows start at 0, stride, 2 x stride, … while inside the image; beyond its border they are zero-padded.
    They are summed one by one in the same order whatever `window_batch`, which only sets how many go through
    `predict` together. Sums are kept for one row of windows at a time: beside the image and the result that
    is 4 O S (W + S) bytes, and what `predict` takes for `window_batch` windows.

    Args:
        predict: windows [n, 3, S, S] -> float32 [n, O, S, S], at the same pixels.
        image: normalized, float [3, H, W], or its pixels, uint8.
        size: S in pixels.
        stride: pixels between the starts of neighboring windows, 1 to `size`.
        window_batch: n, at most.
        decide: averages of some rows [O, rows, W] -> the result there [..., rows, W]; None = themselves.

    Returns:
        What `decide` makes of the mean over all windows that cover a pixel, [..., H, W]; else [O, H, W].

    Raises:
        ValueError: windows that would leave gaps, or none in a batch.
    """
    if not 1 <= stride <= size or window_batch < 1:
        raise ValueError(
            f"expected 1 <= stride <= size and window_batch >= 1, found stride {stride}, size {size} and "
            f"window_batch {window_batch}"
        )
    height, width = image.shape[-2:]
    corners = [(top, left) for top in range(0, height, stride) for left in range(0, width, stride)]
    total: Any = None  # of the predictions over the rows from `at` to `at + size`
    count: Any = None  # of the windows there
    at, results = 0, []

    def finish(rows: int) -> Tensor:
        averages = total[:, :rows, :width] / count[:rows, :width]  # [O, rows, W]
        return averages if decide is None else decide(averages)

    for first in range(0, len(corners), window_batch):
        chunk = corners[first : first + window_batch]
        windows = torch.stack([_cut(image, top, left, size) for top, left in chunk])  # [n, 3, S, S]
        for (top, left), prediction in zip(chunk, predict(windows), strict=True):
            if total is None:
                total = prediction.new_zeros(len(prediction), size, corners[-1][1] + size)
                count = prediction.new_zeros(total.shape[1:])
            if top > at:
                results.append(finish(stride))
                total, count = (F.pad(sums[..., stride:, :], (0, 0, 0, stride)) for sums in (total, count))
                at = top
            total[:, :, left : left + size] += prediction
            count[:, left : left + size] += 1
    return torch.cat([*results, finish(height - at)], dim=-2)


def _cut(image: Tensor, top: int, left: int, size: int) -> Tensor:
    """A window of an image as `slide` takes it, normalized and then zero-padded: float [3, S, S]."""
    window = image[:, top : top + size, left : left + size]
    window = normalize(window) if window.dtype == torch.uint8 else window
    return F.pad(window, (0, size - window.shape[2], 0, size - window.shape[1]))
