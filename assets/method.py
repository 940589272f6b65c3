"""Draws the method, MAE above and Pixio below, into method.png and method.svg beside this file.

    python assets/method.py

Masks and numbers of blocks and tokens are the real ones: MAE as published
(https://arxiv.org/abs/2111.06377), Pixio with its default recipe. The photographs are rendered scenes.
"""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from pixio.models.masking import block_mask
from pixio.synthetic.scenes import render

INK, QUIET, CHANGED = "#22303c", "#a3afb9", "#c8324a"
ENCODER, DECODER = "#2e6f95", "#e09f3e"
HIDDEN = 224  # gray of a masked pixel
RENDERED = 448  # pixels of a scene: 14 x 14 and 16 x 16 patches both divide it
SCENES = (28, 23, 16, 4)  # seeds; the first one is masked
MASK_SEED = 3
SIDE = 1.9  # of an image; lengths are in inches
PITCH = 0.075  # from block to block
# left edges of the columns
DATA, MASK, TOKENS, ENCODE, DECODE, PIXELS = 0.45, 3.45, 6.2, 7.4, 10.2, 13.0
WIDTH, ROW = 15.25, 3.0
_EMBEDDED = re.compile(r"data:image/png;base64,([^\"]+)")


@dataclass(frozen=True)
class Method:
    """What is drawn of a method; `changed` says whether its differences from the other are marked."""

    name: str
    data: str
    n_scenes: int
    grid: int
    mask_grid: int
    n_cls_tokens: int
    decoder_blocks: int
    changed: bool


MAE = Method("MAE", "ImageNet", 1, 14, 1, 1, 8, changed=False)
PIXIO = Method(
    "Pixio", "web images, curated by\ntheir own reconstruction loss", 4, 16, 4, 8, 32, changed=True
)


def draw(axes: Axes, method: Method, y: float) -> None:
    """Draw a method from its data to the pixels it predicts, around the height `y`."""
    mark = CHANGED if method.changed else INK
    scenes = [render(seed, RENDERED).image for seed in SCENES]
    axes.text(0.1, y, method.name, size=18, weight="bold", color=INK, ha="center", va="center", rotation=90)

    cells = (method.grid // method.mask_grid) ** 2
    noise = torch.rand(1, cells, generator=torch.Generator().manual_seed(MASK_SEED))
    mask = block_mask(noise, (method.grid, method.grid), method.mask_grid, 0.75)  # [1, N]
    n_visible = int((mask == 0).sum())
    hidden = mask.numpy().reshape(method.grid, method.grid) > 0
    patch = RENDERED // method.grid
    hidden = hidden.repeat(patch, 0).repeat(patch, 1)[..., None]  # [H, W, 1]

    for i in reversed(range(method.n_scenes)):
        image(axes, scenes[i], DATA + 0.17 * i, y + 0.1 * i)
    caption(axes, DATA + SIDE / 2 + 0.085 * (method.n_scenes - 1), y, method.data, mark)

    arrow(axes, DATA + SIDE + 0.17 * (method.n_scenes - 1), MASK, y)
    image(axes, np.where(hidden, HIDDEN, scenes[0]).astype(np.uint8), MASK, y)
    for i in range(method.grid + 1):  # the grid of patches
        offset = i * SIDE / method.grid
        axes.plot([MASK + offset] * 2, [y - SIDE / 2, y + SIDE / 2], color="white", linewidth=0.5)
        axes.plot([MASK, MASK + SIDE], [y - SIDE / 2 + offset] * 2, color="white", linewidth=0.5)
    size = method.mask_grid
    unit = "single patches" if size == 1 else f"blocks of {size} \N{MULTIPLICATION SIGN} {size} patches"
    caption(axes, MASK + SIDE / 2, y, f"75 % masked,\n{unit}", mark)

    arrow(axes, MASK + SIDE, TOKENS, y)
    column(axes, TOKENS, y, method.n_cls_tokens, CHANGED)
    column(axes, TOKENS + 0.26, y, 8, QUIET)
    plural = "" if method.n_cls_tokens == 1 else "s"
    caption(axes, TOKENS + 0.22, y, f"{method.n_cls_tokens} class token{plural}", mark)
    caption(axes, TOKENS + 0.22, y, f"\n{n_visible} patches", INK)

    arrow(axes, TOKENS + 0.44, ENCODE, y)
    end = bars(axes, ENCODE, y, 32, 1.75, ENCODER)
    caption(axes, (ENCODE + end) / 2, y, "encoder\n(ViT-H: 32 blocks)", INK)

    arrow(axes, end, DECODE, y)
    end = bars(axes, DECODE, y, method.decoder_blocks, 1.05, DECODER)
    caption(axes, (DECODE + end) / 2, y, f"decoder,\n{method.decoder_blocks} blocks", mark)

    arrow(axes, end, PIXELS, y)
    faded = 255 - 0.25 * (255.0 - scenes[0])
    image(axes, np.where(hidden, scenes[0], faded).round().astype(np.uint8), PIXELS, y)
    caption(axes, PIXELS + SIDE / 2, y, "pixels of the\nmasked patches", INK)


def image(axes: Axes, pixels: np.ndarray, x: float, y: float) -> None:
    """An image with its left edge at x, centered at the height y."""
    extent = (x, x + SIDE, y - SIDE / 2, y + SIDE / 2)
    axes.add_patch(
        Rectangle((x, y - SIDE / 2), SIDE, SIDE, facecolor="white", edgecolor="white", linewidth=3)
    )
    axes.imshow(pixels, extent=extent, interpolation="antialiased", aspect="equal", zorder=1)  # as the frame


def column(axes: Axes, x: float, y: float, number: int, color: str) -> None:
    """Tokens, one below the other, filling the height of an image from above."""
    for i in range(number):
        bottom = y + SIDE / 2 - (i + 1) * SIDE / 8 + 0.03
        box = FancyBboxPatch((x + 0.02, bottom), 0.14, 0.14, "round,pad=0.02", facecolor=color, linewidth=0)
        axes.add_patch(box)


def bars(axes: Axes, x: float, y: float, number: int, height: float, color: str) -> float:
    """Blocks, one behind the other; returns where they end."""
    for i in range(number):
        axes.add_patch(
            Rectangle((x + i * PITCH, y - height / 2), 0.7 * PITCH, height, color=color, linewidth=0)
        )
    return x + number * PITCH


def arrow(axes: Axes, start: float, end: float, y: float) -> None:
    """An arrow in the gap between two columns."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.2, "color": INK}
    axes.add_patch(FancyArrowPatch((start + 0.06, y), (end - 0.06, y), shrinkA=0, shrinkB=0, **style))


def caption(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """Text below an image; what Pixio changed is bold."""
    weight = "bold" if color == CHANGED else "normal"
    style = {"size": 10.5, "ha": "center", "va": "top", "linespacing": 1.35}
    axes.text(x, y - SIDE / 2 - 0.14, text, color=color, weight=weight, **style)


def as_jpeg(embedded: re.Match[str]) -> str:
    """A PNG inside of an SVG as a JPEG: a fifth of the bytes."""
    png, jpeg = io.BytesIO(base64.b64decode(embedded[1])), io.BytesIO()
    Image.open(png).convert("RGB").save(jpeg, "JPEG", quality=85, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def main() -> None:
    """Write both files."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pixio"}):
        height = 2 * ROW + 0.1
        figure = Figure((WIDTH, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for i, method in enumerate((PIXIO, MAE)):
            draw(axes, method, 1.72 + ROW * i)
        axes.set(xlim=(-0.15, WIDTH - 0.15), ylim=(0, height))
        target = Path(__file__).with_name("method")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        Image.open(drawn).convert("RGB").save(target.with_suffix(".png"), optimize=True)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", dpi=130, metadata={"Date": None})
        target.with_suffix(".svg").write_text(_EMBEDDED.sub(as_jpeg, drawn.getvalue()))


if __name__ == "__main__":
    main()
