"""The page of `pixio explore`: features of a few photographs, reduced and embedded, to look at by hand.

The page itself is `explorer_page.html`; here the data for it is made. Letters: M patches of all photographs
together, h x w patches of one, C class tokens, D width, K components.

For each block the page holds patch tokens as K scores z of 8 bits on the loadings L of a joint PCA, and of
the mean mu what the scores need: |mu|^2 and L^T mu. From these it computes, for the tokens x = mu + L z, all
products x . y, so that its cosine similarities are those of the tokens but for the components left out and
the rounding of the scores. A class token c enters by c . mu, L^T c and its lengths, with and without mu.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pixio.features.pca import reduce_features
from pixio.files import write_text
from pixio.images.inference import Transform
from pixio.images.normalization import normalize

COMPONENTS = 64
_LEVELS = 127  # of a score, on either side of zero
_QUALITY = 88  # of the JPEGs
_TEMPLATE = Path(__file__).with_name("explorer_page.html")


class View(NamedTuple):
    """A photograph as encoded: uint8 [3, H, W], and per block patches [D, h, w] and class tokens [C, D]."""

    name: str
    pixels: Tensor
    patches: list[Tensor]
    tokens: list[Tensor]


@torch.inference_mode()
def view(encoder: nn.Module, image: str, transform: Transform, blocks: Sequence[int]) -> View:
    """Read and encode an image file; all tokens after the encoder's final norm, on the CPU."""
    pixels, _ = transform.pixels(image)
    device = next(encoder.parameters()).device
    outputs = encoder(normalize(pixels.to(device))[None], blocks)
    grid = encoder.grid_of(*pixels.shape[1:])
    patches = [output["patch_tokens_norm"][0].float().T.unflatten(1, grid).cpu() for output in outputs]
    return View(Path(image).stem, pixels, patches, [o["cls_tokens_norm"][0].float().cpu() for o in outputs])


def write_page(path: Path, views: Sequence[View], blocks: Sequence[int], title: str, patch_size: int) -> int:
    """Write the page; returns its size in bytes.

    Args:
        path: .html file to make.
        views: of the photographs.
        blocks: numbers of the blocks that the views hold.
        title: of the encoder.
        patch_size: in pixels.

    Raises:
        ValueError: too few patches for a PCA.
        OSError: the disk refused.
    """
    colors = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
    data = {
        "title": title,
        "patch": patch_size,
        "colors": _encode(colors),
        "images": [
            {
                "name": one.name,
                "source": _jpeg(one.pixels),
                "width": one.pixels.shape[2],
                "height": one.pixels.shape[1],
                "rows": one.patches[0].shape[1],
                "columns": one.patches[0].shape[2],
            }
            for one in views
        ],
        "blocks": [
            {"number": number, **_reduce([one.patches[i] for one in views], [one.tokens[i] for one in views])}
            for i, number in enumerate(blocks)
        ],
    }
    page = _TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", html.escape(title))
    page = page.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))
    write_text(path, page)
    return len(page.encode())


def _reduce(patches: Sequence[Tensor], tokens: Sequence[Tensor]) -> dict[str, Any]:
    """A block of the page, from per image patches [D, h, w] and class tokens [C, D]."""
    reduced = reduce_features(patches, COMPONENTS)
    scale = reduced.scores.abs().amax(0).clamp(min=1e-12) / _LEVELS  # [K]
    scores = (reduced.scores / scale).round().to(torch.int8)  # [M, K]
    tokens = [torch.cat([some, some.mean(0, keepdim=True)]) for some in tokens if len(some)]  # the mean last
    rows = torch.stack(tokens).flatten(0, 1) if tokens else torch.zeros(0, len(reduced.mean))
    lengths = rows.norm(dim=1), (rows - reduced.mean).norm(dim=1)
    columns = [rows @ reduced.mean, *lengths, *(rows @ reduced.loadings).T]
    return {
        "components": len(scale),
        "explained": reduced.explained,
        "scale": scale.tolist(),
        "scores": _encode(scores.numpy()),
        "mean": (reduced.mean @ reduced.loadings).tolist(),
        "square": reduced.mean.square().sum().item(),
        "tokens": len(tokens[0]) if tokens else 0,
        "token_rows": _encode(torch.stack(columns, dim=1).numpy().astype("<f4")),
    }


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _jpeg(pixels: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
