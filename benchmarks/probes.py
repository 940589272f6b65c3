"""What single patch tokens know about rendered scenes that nothing was trained on: ridge regressions, solved
exactly.

Letters: B scenes, N patches of a scene, p patch size, D features, K classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pixio
from pixio.images.normalization import normalize
from pixio.models.mae import patchify
from pixio.synthetic.scenes import CLASS_NAMES, render

TRAIN_SEEDS, TEST_SEEDS = 1 << 33, 1 << 34  # of trees of seed 1 and 2: train on others
Split = dict[str, Tensor]
View = Callable[[Tensor], Tensor]  # images uint8 [B, 3, H, W] -> features of patches [B, N, D]


def load_split(first: int, count: int, size: int, patch_size: int) -> Split:
    """Render scenes.

    Returns:
        `images` uint8 [B, 3, H, W]; of each patch the majority `classes` and the mean `log_depth` [B, N].
    """
    scenes = [render(seed, size) for seed in range(first, first + count)]
    patches = lambda maps: patchify(torch.stack(maps).unsqueeze(1), patch_size)  # noqa: E731  [B, N, p*p]
    return {
        "images": torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes]),
        "classes": patches([torch.from_numpy(scene.semantics).long() for scene in scenes]).mode(-1).values,
        "log_depth": patches([torch.from_numpy(scene.depth).log() for scene in scenes]).mean(-1),
    }


def raw_pixels(patch_size: int) -> View:
    """The pixels of each patch."""
    return lambda images: patchify(normalize(images), patch_size)


def position(patch_size: int) -> View:
    """Only which patch of the image it is, one-hot."""

    def features(images: Tensor) -> Tensor:
        patches = images.shape[-2] * images.shape[-1] // patch_size**2
        return torch.eye(patches).expand(len(images), -1, -1)

    return features


def patch_tokens(encoder: pixio.PixioViT) -> View:
    """An encoder's patch tokens after the final norm."""

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        chunks = [encoder.eval().forward_features(normalize(chunk)) for chunk in images.split(100)]
        return torch.cat([chunk["patch_tokens_norm"] for chunk in chunks])

    return features


def probe(view: View, train: Split, test: Split) -> dict[str, float]:
    """Fit on one split and measure on the other; mIoU in per cent."""
    classes = F.one_hot(train["classes"], len(CLASS_NAMES)).float()
    targets = torch.cat([classes, train["log_depth"].unsqueeze(-1)], dim=-1).flatten(0, 1)  # [B*N, K + 1]
    tokens, test_tokens = (view(split["images"]).flatten(0, 1) for split in (train, test))  # [B*N, D]
    predicted = ridge(tokens, targets, test_tokens)
    return {
        "mIoU": 100 * mean_iou(predicted[:, :-1].argmax(dim=1), test["classes"].flatten()),
        "depth R2": r2(predicted[:, -1], test["log_depth"].flatten()),
    }


def ridge(x: Tensor, y: Tensor, x_test: Tensor, strength: float = 1e-5) -> Tensor:
    """Penalized least squares on standardized features x [n, D], y [n, K] -> [m, K] for x_test [m, D]."""
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    a, b = (F.pad((features - mean) / std, (0, 1), value=1.0).double() for features in (x, x_test))
    gram = a.T @ a
    gram.diagonal().add_(strength * len(a))
    return (b @ torch.linalg.solve(gram, a.T @ y.double())).float()


def mean_iou(predicted: Tensor, target: Tensor) -> float:
    """Intersection over union, averaged over the classes."""
    pairs = [(predicted == k, target == k) for k in range(len(CLASS_NAMES))]
    return sum(((p & t).sum() / (p | t).sum().clamp(min=1)).item() for p, t in pairs) / len(pairs)


def r2(predicted: Tensor, target: Tensor) -> float:
    """Share of the variance explained: 1 is perfect, 0 is the mean."""
    return 1 - ((predicted - target).square().mean() / target.var(correction=0)).item()
