"""Figures: one look for every plot and sheet that matplotlib draws, in files that are whole or absent."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image

from pixio.files import write_atomic

SUFFIXES = (".png", ".pdf", ".svg")
_DPI = 200
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "image.cmap": "viridis",
    "text.parse_math": False,  # a $ in a name is a $
    "pdf.fonttype": 42,  # text that stays text
    "svg.fonttype": "none",
}
_BAR = 0.12  # inches, width of a color bar


@contextmanager
def figure(path: str | Path | BinaryIO, width: float, height: float, dpi: int = _DPI) -> Iterator[Figure]:
    """Draw a figure in the common style; the file is written when the block ends.

    Args:
        path: file that ends in one of `SUFFIXES`; a file object receives a PNG.
        width, height: inches.
        dpi: resolution of a PNG.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    with matplotlib.rc_context(_STYLE):
        drawn = Figure((width, height), layout="constrained")
        yield drawn
        if isinstance(path, (str, Path)):
            suffix = Path(path).suffix[1:]
            write_atomic(path, lambda file: _save(drawn, file, suffix, dpi))
        else:
            _save(drawn, path, "png", dpi)


def _save(drawn: Figure, file: BinaryIO, suffix: str, dpi: int) -> None:
    """Write a figure; a PNG without matplotlib's alpha channel, compressed as far as it goes."""
    if suffix != "png":
        drawn.savefig(file, format=suffix, dpi=dpi)
        return
    pixels = io.BytesIO()
    drawn.savefig(pixels, format="png", dpi=dpi, pil_kwargs={"compress_level": 0})
    Image.open(pixels).convert("RGB").save(file, "PNG", optimize=True, dpi=(dpi, dpi))


def color_bar(shown: ScalarMappable, axes: Sequence[Axes], label: str, width: float, height: float) -> None:
    """Put a color bar to the right of axes that share one scale.

    Args:
        shown: any of the images drawn, for colors and range.
        axes: the axes beside which it stands.
        label: quantity or unit.
        width, height: of those axes together, in inches.
    """
    bar = axes[0].figure.colorbar(
        shown, ax=axes, label=label, fraction=_BAR / width, pad=0.08 / width, aspect=height / _BAR
    )
    bar.outline.set_visible(False)


def open_axes(*axes: Axes) -> None:
    """Style axes of curves: a faint grid, no frame at the top and at the right."""
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
