"""PixioMAE: the encoder with a deep decoder, trained by reconstructing the pixels of masked blocks.

Three changes to MAE (https://github.com/facebookresearch/mae): the decoder is much deeper (32 blocks by
default), masks are blocks of `mask_grid` x `mask_grid` patches, and there are several class tokens, which the
decoder sees too.
Letters: B images, N patches, V visible patches, C class tokens, D encoder width, E decoder width, p patch
size, K image channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pixio.models.encoder import PixioViT
from pixio.models.layers import NORM_EPS, Block, init_weights, resize_positions, sincos_positions
from pixio.models.masking import block_mask, cell_grid, count_kept, split_patches

TARGET_EPS = 1e-6


class MAEOutput(NamedTuple):
    """What one forward pass of `PixioMAE` gives.

    loss: scalar float32. pred: [B, N, p*p*K], patch vectors in (row, column, channel) order, of normalized
    patches when `norm_pix_loss`. mask: float32 [B, N], 0 = kept, 1 = masked. tokens: [B, V, D], the visible
    patches as they leave the encoder's last block, detached: what `pixio.models.health` measures.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    tokens: Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, K, H, W] -> [B, N, p*p*K]: patches row by row; inside a patch (row, column, channel)."""
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # [B, K, h, w, p, p]
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # [B, N, p*p*K]


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, N, p*p*K] -> [B, K, H, W] for a grid of (h, w) patches."""
    x = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)  # [B, h, w, p, p, K]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, K, H, W]


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of patch vectors, [B, N, p*p*K] -> 2 x [B, N, 1] (unbiased variance, eps 1e-6)."""
    var, mean = torch.var_mean(patches, dim=-1, correction=1, keepdim=True)
    return mean, (var + TARGET_EPS).sqrt()


class PixioMAE(nn.Module):
    """Masked autoencoder around a `PixioViT` (paper, section 3).

    Args:
        encoder: trained in place; its final norm feeds the decoder.
        decoder_embed_dim: decoder width E.
        decoder_depth: decoder blocks.
        decoder_num_heads: decoder attention heads.
        mask_grid: side of a masked cell in patches.
        norm_pix_loss: predict pixels normalized per patch; both published recipes set it.
    """

    def __init__(
        self,
        encoder: PixioViT,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 32,
        decoder_num_heads: int = 16,
        mask_grid: int = 4,
        norm_pix_loss: bool = True,
    ):
        super().__init__()
        cell_grid(encoder.grid, mask_grid)
        self.encoder = encoder
        self.mask_grid = mask_grid
        self.norm_pix_loss = norm_pix_loss

        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, encoder.pos_embed.shape[1], decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, encoder.mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_embed_dim, encoder.patch_size**2 * encoder.in_chans)

        if not self.mask_token.is_meta:
            for name, child in self.named_children():
                if name != "encoder":
                    child.apply(init_weights)
            nn.init.normal_(self.mask_token, std=0.02)
            nn.init.trunc_normal_(self.decoder_pos_embed, std=0.02)

    @torch.no_grad()
    def start_from_sincos(self) -> None:
        """Start the learned positions of patches, in encoder and decoder, from MAE's sine-cosine tables."""
        self.encoder.start_from_sincos()
        positions = self.decoder_pos_embed
        positions[:, self.encoder.n_cls_tokens :] = sincos_positions(self.encoder.grid, positions.shape[-1])

    def forward(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> MAEOutput:
        """Mask, encode, decode, and compare with the pixels of the masked patches.

        Args:
            images: float [B, K, H, W], normalized.
            mask_ratio: share of cells to mask, in [0, 1].
            noise: [B, cells]; the cells with the smallest numbers stay visible. None draws it at random.

        Returns:
            `MAEOutput`; the loss is 0 when nothing is masked.

        Raises:
            ValueError: wrong image size, impossible mask grid or ratio, noise of another shape.
        """
        grid = self.encoder.grid_of(*images.shape[-2:])
        rows, columns = cell_grid(grid, self.mask_grid)
        if noise is None:
            noise = torch.rand(len(images), rows * columns, device=images.device)
        elif len(noise) != len(images):
            raise ValueError(f"noise for {len(noise)} images, but there are {len(images)}: one row each")
        mask = block_mask(noise, grid, self.mask_grid, mask_ratio)  # [B, N]
        n_visible = count_kept(rows * columns, mask_ratio) * self.mask_grid**2
        ids_keep, ids_restore = split_patches(mask, n_visible)  # [B, V], [B, N]
        features = self.encoder(images, block_ids=[-1], ids_keep=ids_keep)[0]
        pred = self.decode(features["cls_tokens_norm"], features["patch_tokens_norm"], ids_restore, grid)
        return MAEOutput(self.loss(images, pred, mask), pred, mask, features["patch_tokens"].detach())

    def decode(
        self, cls_tokens: Tensor, visible: Tensor, ids_restore: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Predict every patch from the class tokens [B, C, D] and the visible patches [B, V, D].

        Args:
            cls_tokens: after the encoder's final norm.
            visible: likewise, in the order of `split_patches`.
            ids_restore: int64 [B, N], from `split_patches`.
            grid: (h, w) of the image in patches.

        Returns:
            [B, N, p*p*K], patches row by row.
        """
        n_cls, n_masked = cls_tokens.shape[1], ids_restore.shape[1] - visible.shape[1]
        x = self.decoder_embed(torch.cat([cls_tokens, visible], dim=1))  # [B, C + V, E]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), n_masked, -1)  # [B, N - V, E]
        patches = torch.cat([x[:, n_cls:], mask_tokens], dim=1)  # [B, N, E], visible patches first
        patches = patches.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [B, N, E]
        x = torch.cat([x[:, :n_cls], patches], dim=1)  # [B, C + N, E]
        x = x + resize_positions(self.decoder_pos_embed, n_cls, self.encoder.grid, grid)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, n_cls:]))  # [B, N, p*p*K]

    def loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the masked patches, in float32: a scalar. Shapes as in `forward`."""
        target = patchify(images.float(), self.encoder.patch_size)  # [B, N, p*p*K]
        if self.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        error = (pred.float() - target).square().mean(dim=-1)  # [B, N]
        return (error * mask).sum() / mask.sum().clamp(min=1)
