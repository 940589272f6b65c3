"""An encoder, frozen or trained, as a source of feature maps.

Letters: B images, H x W pixels, p patch size, h x w = H/p x W/p locations, D width, F channels of a map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pixio.models.finetuning import set_training, train_last_blocks


class FeatureMaps(nn.Module):
    """Feature maps after chosen blocks of an encoder, all of them through its final norm.

    Args:
        encoder: anything with the features contract of `PixioViT`, see `pixio.models.external`.
        block_ids: blocks to take features from, from 0; later ones are not run.
        cls_concat: "mean" concatenates the mean class token to each patch token, F = 2 D; "none" leaves the
            patch tokens alone, F = D.

    Attributes:
        channels: F.

    Raises:
        ValueError: the mean of no class tokens is asked for.
    """

    def __init__(self, encoder: nn.Module, block_ids: Sequence[int], cls_concat: str = "mean"):
        super().__init__()
        if cls_concat == "mean" and encoder.n_cls_tokens == 0:
            raise ValueError("this encoder has no class tokens to take the mean of: use --cls_concat none")
        self.encoder = encoder
        self.block_ids = list(block_ids)
        self.cls_concat = cls_concat
        self.channels = encoder.embed_dim * (2 if cls_concat == "mean" else 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps.

        Args:
            images: normalized (`pixio.images.normalization`), float [B, 3, H, W]; H and W are multiples of p.

        Returns:
            One map [B, F, h, w] per block, in the order of `block_ids`.
        """
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


class FrozenEncoder(FeatureMaps):
    """`FeatureMaps` of an encoder that does not learn: its parameters stop requiring gradients.

    frozen = FrozenEncoder(pixio.pixio_vith16(pretrained="file.pth"), block_ids=[7, 15, 23, 31])
    maps = frozen(images)  # [B, 3, 256, 256] -> four maps [B, 2560, 16, 16]
    """

    def __init__(self, encoder: nn.Module, block_ids: Sequence[int], cls_concat: str = "mean"):
        super().__init__(encoder.requires_grad_(False), block_ids, cls_concat)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in evaluation mode, whatever this is part of."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        return super().forward(images)


class TunedEncoder(FeatureMaps):
    """`FeatureMaps` of an encoder whose last blocks learn.

    Args:
        count: of blocks that learn, see `pixio.models.finetuning.train_last_blocks`.
    """

    def __init__(
        self, encoder: nn.Module, block_ids: Sequence[int], cls_concat: str = "mean", count: int | None = None
    ):
        super().__init__(encoder, block_ids, cls_concat)
        train_last_blocks(encoder, count)

    def train(self, mode: bool = True) -> "TunedEncoder":
        """Switch the blocks that learn; the others stay in evaluation mode."""
        self.training = mode
        set_training(self.encoder, mode)
        return self
