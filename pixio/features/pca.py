"""What patch features show: the colors of a joint PCA, foreground, and similarities.

Pure functions on the encoder's outputs. Letters: M patches of all images together, N patches of one image,
C tokens, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CLIPPED = 0.02  # share of the patches at either end of a component that the colors do not resolve


class Colors(NamedTuple):
    """A joint PCA as pictures.

    maps: per image, float32 [3, h, w], 0 to 1: the first three components as red, green and blue.
    foreground: per image, bool [h, w]; all True where no foreground was asked for. Colors of other patches
        are extrapolated.
    explained: share of the features' variance in the three components, 0 to 1.
    """

    maps: list[Tensor]
    foreground: list[Tensor]
    explained: float


def pca_colors(features: Sequence[Tensor], foreground: bool = False) -> Colors:
    """Color the patches of several images by one PCA, so that like patches look alike across the images.

    Args:
        features: per image, [D, h, w], sizes may differ.
        foreground: leave the background out of the PCA. Patches are split at Otsu's threshold of the first
            component of a PCA over all of them; the side that covers more of the images' borders is the
            background.

    Raises:
        ValueError: fewer than four patches, or a foreground of so few.
    """
    grids = [feature.shape[1:] for feature in features]
    counts = [h * w for h, w in grids]
    patches = torch.cat([feature.flatten(1).T for feature in features]).float()  # [M, D]
    inside = torch.ones(len(patches), dtype=torch.bool, device=patches.device)
    if foreground:
        border = torch.cat([_border(h, w) for h, w in grids]).to(patches.device)
        mean, loadings, _ = _components(patches, 1)
        inside = _foreground(((patches - mean) @ loadings)[:, 0], border)
    mean, loadings, explained = _components(patches[inside], 3)
    scores = (patches - mean) @ loadings  # [M, 3], the background too, so that maps can be interpolated
    ends = torch.tensor([_CLIPPED, 1 - _CLIPPED], device=scores.device)
    low, high = scores[inside].quantile(ends, dim=0)
    colors = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)  # [M, 3]
    maps = [
        part.T.unflatten(1, grid) for part, grid in zip(colors.split(counts), grids, strict=True)
    ]  # [3, h, w] each
    masks = [part.unflatten(0, grid) for part, grid in zip(inside.split(counts), grids, strict=True)]
    return Colors(maps, masks, explained)


class Reduced(NamedTuple):
    """Patches on the first K components of a joint PCA: patch = mean + loadings @ scores, but for the rest.

    scores: [M, K], the patches of all images row by row.
    mean: [D].
    loadings: [D, K], orthonormal columns.
    explained: share of the variance in the components, 0 to 1.
    """

    scores: Tensor
    mean: Tensor
    loadings: Tensor
    explained: float


def reduce_features(features: Sequence[Tensor], number: int) -> Reduced:
    """Reduce the patches of several images by one PCA, to at most `number` components.

    Args:
        features: per image, [D, h, w], sizes may differ.
        number: of components; fewer where width or patches are.

    Raises:
        ValueError: a single patch.
    """
    patches = torch.cat([feature.flatten(1).T for feature in features]).float()  # [M, D]
    number = min(number, patches.shape[1], max(len(patches) - 1, 1))
    mean, loadings, explained = _components(patches, number)
    return Reduced((patches - mean) @ loadings, mean, loadings, explained)


def similarity(queries: Tensor, features: Tensor) -> Tensor:
    """Cosine similarity of C tokens [C, D] to every patch of a map [D, h, w]: [C, h, w], -1 to 1."""
    patches = F.normalize(features.flatten(1), dim=0)  # [D, N]
    return (F.normalize(queries, dim=1) @ patches).unflatten(1, features.shape[1:])  # [C, h, w]


def _components(patches: Tensor, number: int) -> tuple[Tensor, Tensor, float]:
    """Mean [D] and first components [D, number] of patches [M, D], and the share of the variance in them.

    A component's sign is arbitrary; here its largest loading is positive, so that pictures can be repeated.
    """
    if len(patches) <= number:
        raise ValueError(f"{len(patches)} patches are too few for {number} components: use a larger --size")
    mean = patches.mean(0)
    _, spread, components = torch.linalg.svd(patches - mean, full_matrices=False)
    components = components[:number]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))  # [number, 1]
    variance = spread.square()
    explained = variance[:number].sum() / variance.sum().clamp(min=1e-12)
    return mean, (components * largest.sign()).T, explained.item()


def _border(h: int, w: int) -> Tensor:
    """Which patches of a grid lie on its border, bool [N]."""
    border = torch.ones(h, w, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border.flatten()


def _foreground(scores: Tensor, border: Tensor) -> Tensor:
    """Cut scores [M] in two and choose the side with the smaller share of the border patches: bool [M]."""
    ordered = scores.sort().values
    below = torch.arange(1, len(scores), device=scores.device)
    sums = ordered.cumsum(0)[:-1]
    above = len(scores) - below
    between = below * above * (sums / below - (ordered.sum() - sums) / above).square()
    cut = between.argmax()
    high = scores > ordered[cut]
    return high if high[border].float().mean() < 0.5 else ~high
