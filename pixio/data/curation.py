"""Scores by which a web image is judged before training."""

import math

import torch
from torch import Tensor

ENTROPY_SIZE = 256  # side in pixels to which the whole image is resized
_LEVELS = 16  # per channel


def color_entropy(image: Tensor) -> float:
    """Entropy of the colour histogram in bits: `histogram_score` of the curation statistics.

    The whole image is resized to 256 x 256, bicubic and antialiased. Red, green and blue (sRGB, as stored)
    are each cut into 16 equal ranges, and the entropy of the joint histogram of 16 x 16 x 16 = 4,096 bins is
    taken with logarithms of base 2: it lies between 0 (one colour) and 12.

    2^4.5 = 23 equally frequent colours: that is where 4.5 separates. A text page is paper, ink and the few
    mixtures of both along the edges of letters; flat graphics have as many colours as their author chose; a
    blend of two colours is one line through the cube of bins and meets at most 46 of them, few evenly;
    anything grey stays on the diagonal, at most 4 bits. A photograph in colour spreads over hundreds of bins
    by light and shade. (So photographs in black and white are dropped together with scanned pages.)

    Args:
        image: uint8 [3, H, W], RGB, already resized.
    """
    levels = image.to(torch.int64) * _LEVELS // 256  # [3, H, W]
    bins = (levels[0] * _LEVELS + levels[1]) * _LEVELS + levels[2]  # [H, W]
    share = torch.bincount(bins.flatten(), minlength=_LEVELS**3).double() / bins.numel()  # [4096]
    return torch.special.entr(share).sum().item() / math.log(2)
