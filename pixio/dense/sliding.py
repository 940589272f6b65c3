"""Predictions for images of any size, from overlapping square windows.

Letters: H x W pixels of the image, S side of a window, O outputs, n windows of a batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def slide(
    predict: Callable[[Tensor], Tensor], image: Tensor, size: int, stride: int, window_batch: int
) -> Tensor:
    """Predict every window and average where windows overlap.

    Windows start at 0, stride, 2 x stride, … while inside the image; beyond its border they are zero-padded.
    They are summed one by one in the same order whatever `window_batch`, which only sets how many go through
    `predict` together.

    Args:
        predict: windows [n, 3, S, S] -> [n, O, S, S], at the same pixels.
        image: normalized, float [3, H, W].
        size: S in pixels.
        stride: pixels between the starts of neighbouring windows, 1 to `size`.
        window_batch: n, at most.

    Returns:
        The mean over all windows that cover a pixel, [O, H, W].

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
    bottom, right = (last + size for last in corners[-1])
    padded = F.pad(image, (0, max(right - width, 0), 0, max(bottom - height, 0)))
    total, count = None, padded.new_zeros(padded.shape[-2:])
    for first in range(0, len(corners), window_batch):
        chunk = corners[first : first + window_batch]
        windows = torch.stack(
            [padded[:, top : top + size, left : left + size] for top, left in chunk]
        )  # [n, 3, S, S]
        for (top, left), prediction in zip(chunk, predict(windows), strict=True):
            if total is None:
                total = prediction.new_zeros(len(prediction), *padded.shape[-2:])
            total[:, top : top + size, left : left + size] += prediction
            count[top : top + size, left : left + size] += 1
    return total[:, :height, :width] / count[:height, :width]  # [O, H, W]
