"""Heads for depth and segmentation on the feature maps of an encoder: linear and DPT.

    head = DPTHead(channels=2 * 1280, outputs=150)
    logits = head(feature_maps, size=(480, 640))  # four maps [B, 2560, h, w] -> [B, 150, 480, 640]

Letters: B images, F channels of a feature map, h x w its locations, O outputs (classes, or 1 for depth),
H x W pixels. DPT: Ranftl et al., arXiv 2103.13413 (https://github.com/isl-org/DPT), here without BatchNorm.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("linear", "dpt")
WIDTH = 256  # channels in which a DPT head fuses its four maps, as published
PYRAMID = (1, 2, 4, 4)  # channels of the four maps before fusion, fine to coarse, as multiples of it


def head_blocks(kind: str, depth: int) -> list[int]:
    """Encoder blocks a head reads: the last one, or four evenly spaced (of 32: 7, 15, 23, 31).

    Raises:
        ValueError: the encoder has fewer than four blocks to choose from.
    """
    if kind == "linear":
        return [depth - 1]
    if depth < 4:
        raise ValueError(f"a DPT head reads four blocks, but the encoder has {depth}: choose --head linear")
    return [depth * k // 4 - 1 for k in (1, 2, 3, 4)]


class SyncGroup(Protocol):
    """The processes that share a batch; a `pixio.engine.runtime.Runtime` is one."""

    @property
    def world_size(self) -> int: ...

    def mean(self, tensor: Tensor) -> Tensor:
        """Collective: the mean of `tensor` over the ranks, detached."""


def make_head(
    kind: str, channels: int, outputs: int, ranks: SyncGroup | None = None, width: int = WIDTH
) -> nn.Module:
    """Build a head with fresh weights.

    Args:
        kind: one of `KINDS`.
        channels: F of each feature map.
        outputs: O.
        ranks: processes that share the BatchNorm statistics of a linear head; None: each has its own.
        width: C of a DPT head.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown head '{kind}': choose one of {', '.join(KINDS)}")
    return LinearHead(channels, outputs, ranks) if kind == "linear" else DPTHead(channels, outputs, width)


class LinearHead(nn.Module):
    """BatchNorm and one linear map per location; arguments as of `make_head`."""

    def __init__(self, channels: int, outputs: int, ranks: SyncGroup | None = None):
        super().__init__()
        self.norm = SyncedBatchNorm2d(channels, ranks)
        self.predict = nn.Conv2d(channels, outputs, 1)

    def forward(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """One feature map [B, F, h, w] in a list -> logits, float32 [B, O, H, W] with (H, W) = `size`."""
        (x,) = features
        return resize(self.predict(self.norm(x)), size)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all ranks' inputs, on any device (torch's needs a GPU).

    The ranks' batches must have the same size. Without ranks it is torch's BatchNorm2d.

    Args:
        channels: F.
        ranks: processes that share the statistics.
        **options: of torch's BatchNorm2d.
    """

    def __init__(self, channels: int, ranks: SyncGroup | None = None, **options: Any):
        super().__init__(channels, **options)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, h, w] -> the same shape, float32."""
        x = x.float()
        if not self.training or self.ranks is None:
            return super().forward(x)
        mean = _mean_over(self.ranks, x.mean((0, 2, 3)))  # [F]
        variance = _mean_over(self.ranks, (x - mean[:, None, None]).square().mean((0, 2, 3)))  # [F]
        count = x.numel() // x.shape[1] * self.ranks.world_size
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * count / max(count - 1, 1), self.momentum)
        self.num_batches_tracked += 1
        if not x.requires_grad:
            return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)
        # torch takes the statistics it is given for constants: here the gradient flows through them too
        x = (x - mean[:, None, None]) * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            x = x * self.weight[:, None, None] + self.bias[:, None, None]
        return x


def _mean_over(ranks: SyncGroup, tensor: Tensor) -> Tensor:
    """The mean over the ranks; its gradient is that of the mean of the ranks' losses."""
    return _RankMean.apply(tensor, ranks) if tensor.requires_grad else ranks.mean(tensor)


class _RankMean(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, ranks: SyncGroup) -> Tensor:
        context.ranks = ranks
        return ranks.mean(tensor).clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return context.ranks.mean(gradient), None


class DPTHead(nn.Module):
    """Four feature maps, resampled to strides of 1/4, 1/2, 1 and 2 patches and fused from coarse to fine.

    Args:
        channels: F of each feature map.
        outputs: O.
        width: C, channels in which the maps are fused; computation grows with its square.
    """

    def __init__(self, channels: int, outputs: int, width: int = WIDTH):
        super().__init__()
        pyramid = [factor * width for factor in PYRAMID]
        self.project = nn.ModuleList(nn.Conv2d(channels, each, 1) for each in pyramid)
        self.rescale = nn.ModuleList(
            [
                nn.ConvTranspose2d(pyramid[0], pyramid[0], 4, stride=4),
                nn.ConvTranspose2d(pyramid[1], pyramid[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(pyramid[3], pyramid[3], 3, stride=2, padding=1),
            ]
        )
        self.reduce = nn.ModuleList(nn.Conv2d(each, width, 3, padding=1, bias=False) for each in pyramid)
        self.fuse = nn.ModuleList(Fusion(width, has_skip=level < 3) for level in range(4))
        self.output = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, outputs, 1)
        )

    def forward(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Four feature maps [B, F, h, w], early to late -> logits, float32 [B, O, H, W], (H, W) = `size`."""
        maps = [
            reduce(rescale(project(x)))
            for x, project, rescale, reduce in zip(
                features, self.project, self.rescale, self.reduce, strict=True
            )
        ]  # [B, C, 4h, 4w], [B, C, 2h, 2w], [B, C, h, w], [B, C, ceil(h/2), ceil(w/2)]
        sizes = [tuple(2 * side for side in maps[0].shape[-2:])] + [x.shape[-2:] for x in maps[:-1]]
        x = self.fuse[3](maps[3], None, sizes[3])  # [B, C, h, w]
        for level in (2, 1, 0):
            x = self.fuse[level](x, maps[level], sizes[level])  # at last [B, C, 8h, 8w]
        return resize(self.output(x), size)


class Fusion(nn.Module):
    """Fusion block: adds the skip map of its level to the coarser path and upsamples the sum."""

    def __init__(self, width: int, has_skip: bool):
        super().__init__()
        if has_skip:
            self.refine_skip = ResidualConvUnit(width)
        self.refine = ResidualConvUnit(width)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        """[B, F, h, w] twice, the skip map absent at the coarsest level -> [B, F, *size]."""
        if skip is not None:
            x = x + self.refine_skip(skip)
        x = self.refine(x)
        return self.mix(F.interpolate(x, size, mode="bilinear", align_corners=True))


class ResidualConvUnit(nn.Module):
    """x + two 3x3 convolutions of it, each after a ReLU."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly (`align_corners=True`) in float32: [B, O, h, w] -> [B, O, *size]."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)
