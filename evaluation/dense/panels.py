"""Pictures of what was predicted: input, ground truth and prediction of a few images, side by side.

Letters: H x W pixels.
"""

import colorsys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

from pixio.images.figures import color_bar, figure

UNKNOWN = "0.85"  # gray of what was not measured, and of ignored pixels
_TITLES = ("input", "ground truth", "prediction")
_SIDE = 3.0  # inches, width of a panel
_MARGIN = 1.5  # inches to the right of the panels, for a color bar or a legend
_NAMED = 24  # classes in a legend, at most


def draw_depth(
    path: Path,
    images: list[Tensor],
    targets: list[Tensor],
    predictions: list[Tensor],
    min_depth: float,
    max_depth: float,
) -> None:
    """One row per image, with a color bar in meters that truth and prediction share.

    Args:
        path: PNG to write.
        images: uint8 [3, H, W].
        targets: meters, [H, W]; outside of the range of depths = not measured, left gray.
        predictions: meters, [H, W].
        min_depth, max_depth: range of depths that count.
    """
    colors = matplotlib.colormaps["turbo"].with_extremes(bad=UNKNOWN)
    with _panels(path, images) as axes:
        for row, target, prediction in zip(axes, targets, predictions, strict=True):
            truth = np.ma.masked_outside(target.numpy(), min_depth, max_depth)
            far = truth.max() if truth.count() else max_depth
            for axis, depth in ((row[1], truth), (row[2], prediction.numpy())):
                shown = axis.imshow(depth, cmap=colors, vmin=0, vmax=far, interpolation="nearest")
            height = _SIDE * target.shape[0] / target.shape[1]
            color_bar(shown, row[1:], "m", 2 * _SIDE, height)


def draw_classes(
    path: Path,
    images: list[Tensor],
    targets: list[Tensor],
    predictions: list[Tensor],
    names: tuple[str, ...],
) -> None:
    """As `draw_depth`, with a legend of the classes in sight, the most frequent first.

    Args:
        path, images: see there.
        targets, predictions: classes, [H, W]; beyond the names = ignored, left gray.
        names: of the classes.
    """
    # neighbors in number lie far apart in hue and lightness
    palette = [colorsys.hls_to_rgb(0.618 * c % 1, 0.35 + 0.1 * (c % 4), 0.75) for c in range(len(names))]
    colors = ListedColormap([*palette, UNKNOWN])
    pixels = np.zeros(len(names) + 1, np.int64)
    with _panels(path, images) as axes:
        for row, target, prediction in zip(axes, targets, predictions, strict=True):
            for axis, classes in ((row[1], target), (row[2], prediction)):
                classes = np.minimum(classes.numpy(), len(names))
                pixels += np.bincount(classes.ravel(), minlength=len(pixels))
                axis.imshow(classes, cmap=colors, vmin=0, vmax=len(names), interpolation="nearest")
        seen = [c for c in np.argsort(-pixels[:-1], kind="stable") if pixels[c]]
        axes[0, 0].figure.legend(
            handles=[Patch(color=palette[c], label=names[c]) for c in seen[:_NAMED]],
            title="" if len(seen) <= _NAMED else f"{_NAMED} of {len(seen)} classes",
            loc="outside right upper",
        )


@contextmanager
def _panels(path: Path, images: list[Tensor]) -> Iterator[np.ndarray]:
    """Axes [rows, 3] of a picture with one row per image, the images in its first column."""
    heights = [image.shape[1] / image.shape[2] for image in images]
    width, height = len(_TITLES) * _SIDE + _MARGIN, _SIDE * sum(heights) + 0.4
    with figure(path, width, height, dpi=120) as drawn:
        axes = drawn.subplots(len(images), len(_TITLES), height_ratios=heights, squeeze=False)
        for title, axis in zip(_TITLES, axes[0], strict=True):
            axis.set_title(title)
        for row, image in zip(axes, images, strict=True):
            row[0].imshow(image.permute(1, 2, 0).numpy())
            for axis in row:
                axis.set_axis_off()
        yield axes
