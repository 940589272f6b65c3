"""From pixels (0-255) to what the encoder takes, and back; needs torch alone.

Shapes: B images, H rows, W columns. Crops stay uint8 until `normalize`, which runs where the batch is, so
that workers ship a quarter of the bytes.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet mean and standard deviation on the 0-255 scale, each [3, 1, 1], kept per device."""
    mean, std = (torch.tensor(values, device=device) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean[:, None, None], std[:, None, None]


def normalize(images: Tensor) -> Tensor:
    """Shift and scale pixels by the ImageNet statistics, on the device the images are on.

    Args:
        images: uint8 [B, 3, H, W] or [3, H, W], RGB, 0-255.

    Returns:
        float32, same shape, contiguous: (pixel / 255 - mean) / std.

    Raises:
        ValueError: the images are not uint8 (already normalized, or on another scale).
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"normalize expects uint8 pixels (0-255), found {images.dtype}: pass crops as read")
    mean, std = _statistics(images.device)
    return (images.to(torch.float32, memory_format=torch.contiguous_format) - mean) / std


def denormalize(images: Tensor) -> Tensor:
    """Undo `normalize`: float [B, 3, H, W] or [3, H, W] -> uint8, rounded and clipped to 0-255."""
    mean, std = _statistics(images.device)
    return (images.float() * std + mean).round().clamp(0, 255).to(torch.uint8)


def to_tensor(image: "Image.Image") -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]
