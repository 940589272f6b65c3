"""Depth: the training loss and the nine published metrics. Depth is in meters, 0 = not measured."""

import numpy as np
import torch
from torch import Tensor

METRICS = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
HIGHER_IS_BETTER = ("d1", "d2", "d3")
MIN_PIXELS = 10  # images with fewer measured pixels are not scored
VARIANCE_FOCUS = 0.5


def measured(depth: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Which pixels count: True where `min_depth` <= depth <= `max_depth`."""
    return (depth >= min_depth) & (depth <= max_depth)


def silog_loss(prediction: Tensor, target: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Scale-invariant logarithmic loss over all measured pixels together (Eigen et al., arXiv 1406.2283).

    Args:
        prediction: meters, float32 [B, H, W].
        target: meters, [B, H, W].
        min_depth, max_depth: range of pixels that count; predictions are raised to `min_depth`.

    Returns:
        sqrt(mean d^2 - 0.5 (mean d)^2) with d = log target - log prediction; without gradient where no pixel
        counts.
    """
    valid = measured(target, min_depth, max_depth)
    count = valid.sum().clamp(min=1)
    ratio = target.clamp(min=min_depth).log() - prediction.clamp(min=min_depth).log()
    d = torch.where(valid, ratio, 0)
    variance = d.square().sum() / count - VARIANCE_FOCUS * (d.sum() / count).square()
    return variance.clamp(min=1e-12).sqrt()  # the root has no finite slope at 0


def depth_metrics(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The nine metrics of one image.

    Args:
        prediction, target: meters > 0 at the measured pixels, float64 [n].

    Returns:
        d1, d2, d3: percent of pixels whose ratio to the truth is below 1.25, 1.25^2, 1.25^3; abs_rel and
        sq_rel: mean |error| and mean error^2 (m), each over the true depth; rmse in meters; rmse_log with
        natural logarithms; log10: mean |error| of decimal ones; silog: as in the loss.
    """
    error = prediction - target
    d = np.log(prediction) - np.log(target)
    ratio = np.maximum(prediction / target, target / prediction)
    return {
        "d1": 100 * np.mean(ratio < 1.25),
        "d2": 100 * np.mean(ratio < 1.25**2),
        "d3": 100 * np.mean(ratio < 1.25**3),
        "abs_rel": np.mean(np.abs(error) / target),
        "sq_rel": np.mean(error**2 / target),
        "rmse": np.sqrt(np.mean(error**2)),
        "rmse_log": np.sqrt(np.mean(d**2)),
        "log10": np.mean(np.abs(np.log10(prediction) - np.log10(target))),
        "silog": np.sqrt(np.mean(d**2) - VARIANCE_FOCUS * np.mean(d) ** 2),
    }


class DepthScores:
    """The metrics of a data set: of each image, then averaged over images.

    Attributes:
        state: what a rank knows, index of the image -> metrics, None if it has too few measured pixels.
    """

    def __init__(self, min_depth: float, max_depth: float):
        self.min_depth, self.max_depth = min_depth, max_depth
        self.state: dict[int, dict[str, float] | None] = {}

    def add(self, index: int, prediction: Tensor, target: Tensor) -> None:
        """Score an image.

        Args:
            index: of the image in the data set.
            prediction: meters, [H, W].
            target: meters, [H, W], 0 = not measured.
        """
        valid = measured(target, self.min_depth, self.max_depth)
        prediction = prediction.clamp(self.min_depth, self.max_depth)
        prediction, truth = (x[valid].cpu().double().numpy() for x in (prediction, target))
        self.state[index] = depth_metrics(prediction, truth) if len(truth) >= MIN_PIXELS else None

    @staticmethod
    def summarize(states: list[dict[int, dict[str, float] | None]]) -> dict[str, float | int]:
        """The mean metrics over the images of all ranks, the same for any number of them.

        Returns:
            `METRICS`, and `images` and `skipped`: the numbers of images scored and left out.

        Raises:
            ValueError: no image has measured pixels.
        """
        rows = [row for _, row in sorted(item for state in states for item in state.items())]
        scored = [row for row in rows if row is not None]
        if not scored:
            raise ValueError(
                f"none of the {len(rows)} images has {MIN_PIXELS} pixels measured between --min_depth and "
                "--max_depth: check both and the unit of the depth files"
            )
        means = {name: float(np.mean([row[name] for row in scored])) for name in METRICS}
        return {**means, "images": len(scored), "skipped": len(rows) - len(scored)}
