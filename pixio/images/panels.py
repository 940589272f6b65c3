"""Pictures of depth maps and masks beside their photographs, with a color bar or a legend.

Letters: H x W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from pixio.images.figures import color_bar, figure

UNKNOWN = "0.85"  # gray of what was not measured, and of ignored pixels
_DPI = 120
_SIDE = 3.0  # inches, width of a panel
_MARGIN = 1.5  # inches to the right of the panels, for a color bar or a legend
_LINE = 0.18  # inches, height of a line of the legend
_SHOWN = 1200  # pixels of the longer side that are drawn, at least

Maps = Mapping[str, Sequence[np.ndarray]]


def draw_depth(
    path: Path,
    images: Sequence[np.ndarray],
    maps: Maps,
    min_depth: float,
    max_depth: float,
    side: float = _SIDE,
) -> None:
    """One row per image, with a color bar in meters that its maps share; the first of them sets the scale.

    Args:
        path: PNG to write.
        images: uint8 [H, W, 3].
        maps: title -> per image meters, [H, W]; outside of the range of depths = not measured, left gray.
        min_depth, max_depth: range of depths that count.
        side: width of a panel in inches.
    """
    colors = matplotlib.colormaps["turbo"].with_extremes(bad=UNKNOWN)
    with _panels(path, images, list(maps), side) as axes:
        for row, *depths in zip(axes, *maps.values(), strict=True):
            depths = [np.ma.masked_outside(_subsample(depth), min_depth, max_depth) for depth in depths]
            far = depths[0].max() if depths[0].count() else max_depth
            for axis, depth in zip(row[1:], depths, strict=True):
                shown = axis.imshow(depth, cmap=colors, vmin=0, vmax=far, interpolation="nearest")
            height, width = depths[0].shape
            color_bar(shown, row[1:], "m", len(depths) * side, side * height / width)


def draw_classes(
    path: Path,
    images: Sequence[np.ndarray],
    maps: Maps,
    names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    side: float = _SIDE,
) -> None:
    """As `draw_depth`, with a legend of the classes in sight, the most frequent first.

    Args:
        path, images, side: see there.
        maps: title -> per image classes, [H, W]; beyond the names = ignored, left gray.
        names, colors: of the classes, colors 0-255.
    """
    palette = [tuple(part / 255 for part in color) for color in colors]
    shades = ListedColormap([*palette, UNKNOWN])
    pixels = np.zeros(len(names) + 1, np.int64)
    with _panels(path, images, list(maps), side) as axes:
        for row, *masks in zip(axes, *maps.values(), strict=True):
            for axis, classes in zip(row[1:], masks, strict=True):
                classes = np.minimum(classes.astype(np.int64), len(names))
                pixels += np.bincount(classes.ravel(), minlength=len(pixels))
                shown = _subsample(classes)
                axis.imshow(shown, cmap=shades, vmin=0, vmax=len(names), interpolation="nearest")
        seen = [c for c in np.argsort(-pixels[:-1], kind="stable") if pixels[c]]
        drawn = axes[0, 0].figure
        named = max(int(drawn.get_figheight() / _LINE) - 2, 1)
        drawn.legend(
            handles=[Patch(color=palette[c], label=names[c]) for c in seen[:named]],
            title="" if len(seen) <= named else f"{named} of {len(seen)} classes",
            loc="outside right upper",
        )


@contextmanager
def _panels(
    path: Path, images: Sequence[np.ndarray], titles: Sequence[str], side: float
) -> Iterator[np.ndarray]:
    """Axes [rows, 1 + maps] of a picture with one row per image, the images in its first column."""
    heights = [min(max(image.shape[0] / image.shape[1], 0.2), 5.0) for image in images]
    width, height = (1 + len(titles)) * side + _MARGIN, side * sum(heights) + 0.4
    with figure(path, width, height, dpi=_DPI) as drawn:
        axes = drawn.subplots(len(images), 1 + len(titles), height_ratios=heights, squeeze=False)
        for title, axis in zip(("input", *titles), axes[0], strict=True):
            axis.set_title(title)
        for row, image in zip(axes, images, strict=True):
            row[0].imshow(_subsample(image))
            for axis in row:
                axis.set_axis_off()
        yield axes


def _subsample(pixels: np.ndarray) -> np.ndarray:
    """Every n-th row and column of an image or map that is larger than it is drawn."""
    step = max(max(pixels.shape[:2]) // _SHOWN, 1)
    return pixels[::step, ::step]
