"""What the outputs of a head stand for: depth in meters, or classes.

Letters: B images or windows, O outputs of a head, H x W pixels.
"""

import colorsys
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

Color: TypeAlias = tuple[int, int, int]  # red, green, blue, 0-255


@dataclass(frozen=True)
class Depth:
    """One output, whose sigmoid is a share of the farthest depth.

    Attributes:
        min_depth, max_depth: range of the predictions in meters.
    """

    min_depth: float
    max_depth: float
    task: ClassVar[str] = "monodepth"
    count: ClassVar[int] = 1

    def average(self, logits: Tensor) -> Tensor:
        """What is averaged where windows overlap: meters, [B, 1, H, W]."""
        return logits.sigmoid() * self.max_depth

    def decide(self, averages: Tensor) -> Tensor:
        """Averages [..., 1, H, W] -> meters, float32 [..., H, W]."""
        return averages.select(-3, 0).clamp(self.min_depth, self.max_depth)


@dataclass(frozen=True)
class Classes:
    """One output per class.

    Attributes:
        names: of the classes, at most 255, so that a class fits into a byte beside "ignored".
        colors: of the classes in pictures.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    task: ClassVar[str] = "semseg"

    @classmethod
    def of(cls, names: tuple[str, ...]) -> "Classes":
        """Classes of these names; neighbors in number get colors far apart in hue and lightness."""
        palette = [colorsys.hls_to_rgb(0.618 * c % 1, 0.35 + 0.1 * (c % 4), 0.75) for c in range(len(names))]
        return cls(names, tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in palette))

    @property
    def count(self) -> int:
        """O."""
        return len(self.names)

    def average(self, logits: Tensor) -> Tensor:
        """What is averaged where windows overlap: probabilities, [B, O, H, W]."""
        return logits.softmax(1)

    def decide(self, averages: Tensor) -> Tensor:
        """Averages [..., O, H, W] -> classes, uint8 [..., H, W]."""
        return averages.argmax(-3).to(torch.uint8)


Output: TypeAlias = Depth | Classes
