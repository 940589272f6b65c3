"""A frozen encoder as a source of feature maps.

Letters: B images, H x W pixels, p patch size, h x w = H/p x W/p locations, D width, F channels of a map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FrozenEncoder(nn.Module):
    """Feature maps after some blocks of an encoder: final-norm'd patch tokens, and what all tokens share.

    Args:
        encoder: anything with the features contract of `PixioViT`, see `pixio.models.external`.
        block_ids: blocks to take features from; later ones are not run.
        cls_concat: "mean" puts the mean of the final-norm'd class tokens beside each patch token, F = 2 D;
            "none" leaves the patch tokens alone, F = D.

    Raises:
        ValueError: the mean of no class tokens is asked for.
    """

    def __init__(self, encoder: nn.Module, block_ids: Sequence[int], cls_concat: str = "mean"):
        super().__init__()
        if cls_concat == "mean" and encoder.n_cls_tokens == 0:
            raise ValueError("this encoder has no class tokens to take the mean of: use --cls_concat none")
        self.encoder = encoder.requires_grad_(False)
        self.block_ids = list(block_ids)
        self.cls_concat = cls_concat
        self.channels = encoder.embed_dim * (2 if cls_concat == "mean" else 1)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stays in evaluation mode, whatever it is part of."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalized images [B, 3, H, W] -> one map [B, F, h, w] per block."""
        p = self.encoder.patch_size
        grid = images.shape[-2] // p, images.shape[-1] // p
        maps = []
        for features in self.encoder(images, self.block_ids):
            tokens = features["patch_tokens_norm"]  # [B, N, D]
            if self.cls_concat == "mean":
                shared = features["cls_tokens_norm"].mean(1, keepdim=True)  # [B, 1, D]
                tokens = torch.cat([tokens, shared.expand_as(tokens)], dim=2)  # [B, N, 2 D]
            maps.append(tokens.transpose(1, 2).unflatten(2, grid))  # [B, F, h, w]
        return maps
