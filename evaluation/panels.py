"""Pictures of what was predicted: input, ground truth and prediction of a few images, side by side.

Letters: H x W pixels.
"""

import colorsys
from typing import BinaryIO

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

UNKNOWN = "0.85"  # grey of what was not measured, and of ignored pixels
_TITLES = ("input", "ground truth", "prediction")
_NAMED = 24  # classes in a legend, at most


def draw_depth(
    file: BinaryIO,
    images: list[Tensor],
    targets: list[Tensor],
    predictions: list[Tensor],
    min_depth: float,
    max_depth: float,
) -> None:
    """One row per image, with a colour bar in metres that truth and prediction share.

    Args:
        file: receives a PNG.
        images: uint8 [3, H, W].
        targets: metres, [H, W]; outside of the range of depths = not measured, left grey.
        predictions: metres, [H, W].
        min_depth, max_depth: range of depths that count.
    """
    figure, axes = _grid(images)
    colours = plt.get_cmap("turbo").with_extremes(bad=UNKNOWN)
    for row, target, prediction in zip(axes, targets, predictions, strict=True):
        truth = np.ma.masked_outside(target.numpy(), min_depth, max_depth)
        far = truth.max() if truth.count() else max_depth
        for axis, depth in ((row[1], truth), (row[2], prediction.numpy())):
            shown = axis.imshow(depth, cmap=colours, vmin=0, vmax=far, interpolation="nearest")
        figure.colorbar(shown, ax=list(row[1:]), label="m", fraction=0.03)
    _write(figure, file)


def draw_classes(
    file: BinaryIO,
    images: list[Tensor],
    targets: list[Tensor],
    predictions: list[Tensor],
    names: tuple[str, ...],
) -> None:
    """One row per image, with a legend of the classes in sight, the most frequent first.

    Args:
        file: receives a PNG.
        images: uint8 [3, H, W].
        targets: classes, [H, W]; beyond the names = ignored, left grey.
        predictions: classes, [H, W].
        names: of the classes.
    """
    figure, axes = _grid(images)
    # neighbours in number lie far apart in hue and lightness
    palette = [colorsys.hls_to_rgb(0.618 * c % 1, 0.35 + 0.1 * (c % 4), 0.75) for c in range(len(names))]
    colours = matplotlib.colors.ListedColormap([*palette, UNKNOWN])
    pixels = np.zeros(len(names) + 1, np.int64)
    for row, target, prediction in zip(axes, targets, predictions, strict=True):
        for axis, classes in ((row[1], target), (row[2], prediction)):
            classes = np.minimum(classes.numpy(), len(names))
            pixels += np.bincount(classes.ravel(), minlength=len(pixels))
            axis.imshow(classes, cmap=colours, vmin=0, vmax=len(names), interpolation="nearest")
    seen = [c for c in np.argsort(-pixels[:-1], kind="stable") if pixels[c]]
    figure.legend(
        handles=[Patch(color=palette[c], label=names[c]) for c in seen[:_NAMED]],
        title="" if len(seen) <= _NAMED else f"{_NAMED} of {len(seen)} classes",
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    _write(figure, file)


def _grid(images: list[Tensor]) -> tuple[plt.Figure, np.ndarray]:
    """A figure with one row per image, the images in its first column."""
    heights = [image.shape[1] / image.shape[2] for image in images]
    figure, axes = plt.subplots(
        len(images),
        len(_TITLES),
        figsize=(10.5, 2.9 * sum(heights) + 0.4),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for title, axis in zip(_TITLES, axes[0], strict=True):
        axis.set_title(title)
    for row, image in zip(axes, images, strict=True):
        row[0].imshow(image.permute(1, 2, 0).numpy())
        for axis in row:
            axis.set_axis_off()
    return figure, axes


def _write(figure: plt.Figure, file: BinaryIO) -> None:
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
