"""PixioViT, the encoder: a plain vision transformer with several class tokens.

Letters: B images, H x W pixels, p patch size, N = H/p * W/p patches, C class tokens, V visible patches,
D width, K images whose branch is computed.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixio.models.layers import (
    NORM_EPS,
    Block,
    PatchEmbed,
    images_to_keep,
    init_weights,
    resize_positions,
    sincos_positions,
    stochastic_depth,
)


class PixioViT(nn.Module):
    """Vision transformer with `n_cls_tokens` class tokens and learnable positions for all tokens (paper,
    section 3).

    Args:
        img_size: native input size in pixels, one number or (height, width); other sizes work too, the
            positions are then resized.
        patch_size: side of a square patch in pixels.
        in_chans: input channels.
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the MLP / D.
        n_cls_tokens: number of class tokens C.
        drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first.
        drop_path_mode: "exact" draws for each image; "skip" leaves dropped branches uncomputed, for a fixed
            number of images (`images_to_keep`).
        norm_layer: for code that names it, as in `partial(nn.LayerNorm, eps=1e-6)`; there is no other choice.

    Attributes:
        grad_checkpointing: activation checkpointing per block: less memory, about a third more time.

    Raises:
        ValueError: a size that the patch size does not divide, a width that the heads do not divide, or
            another norm.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1280,
        depth: int = 32,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        n_cls_tokens: int = 8,
        drop_path: float = 0.0,
        drop_path_mode: Literal["exact", "skip"] = "exact",
        norm_layer: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        if norm_layer is not None and str(found := norm_layer(embed_dim)) != str(norm):
            raise ValueError(f"norm_layer gives {found}, but the weights were trained with {norm}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path} is not in [0, 1)")
        if drop_path_mode not in ("exact", "skip"):
            raise ValueError(f"unknown drop_path_mode {drop_path_mode!r}: choose exact or skip")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = height, width
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.n_cls_tokens = n_cls_tokens
        self.drop_path = drop_path
        self.drop_path_mode = drop_path_mode
        self.grid = self.grid_of(*self.img_size)
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim)
        n_positions = n_cls_tokens + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.empty(1, n_cls_tokens, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, n_positions, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = norm

        if not self.pos_embed.is_meta:  # drawing there makes torch import its compiler, which takes a second
            self.apply(init_weights)
            nn.init.normal_(self.cls_token, std=0.02)
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @torch.no_grad()
    def start_from_sincos(self) -> None:
        """Start the learned positions of patches from MAE's sine-cosine tables.

        The published initialization, normal with std 0.02, has a fiftieth of the scale of a patch's
        embedding: attention cannot tell positions apart until it has grown, which takes more steps than a
        small run has.
        """
        self.pos_embed[:, self.n_cls_tokens :] = sincos_positions(self.grid, self.embed_dim)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patch grid (rows, columns) of an image of height x width pixels.

        Raises:
            ValueError: a side that is not a multiple of the patch size.
        """
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            raise ValueError(
                f"image of {height} x {width} pixels: both sides must be multiples of the patch size {p}; "
                f"resize or pad, e.g. to {max(round(height / p), 1) * p} x {max(round(width / p), 1) * p}"
            )
        return height // p, width // p

    def forward(
        self, images: Tensor, block_ids: Sequence[int] | None = None, ids_keep: Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """Features after the blocks asked for; blocks beyond the last one asked for are not run.

        Args:
            images: float [B, in_chans, H, W], RGB normalized with the ImageNet mean and standard deviation
                (`pixio.transform`), H and W multiples of `patch_size`, rectangles allowed; or one image
                [in_chans, H, W], a batch of one.
            block_ids: 0-based blocks, negative ones counted from the end; None means all, [] runs none and
                returns [].
            ids_keep: int64 [B, V], patches to see, for masked training; None means all, V = N.

        Returns:
            One dict per block id, in the order asked: `patch_tokens` [B, V, D] and `cls_tokens` [B, C, D] as
            they leave the block, `patch_tokens_norm` and `cls_tokens_norm` after the final LayerNorm. Patches
            go row by row, or in the order of `ids_keep`. Mean over the class tokens = the recommended global
            embedding.

        Raises:
            ValueError: wrong image shape or an unknown block id.
        """
        wanted = self.resolve_blocks(block_ids)
        x = self._embed(images, ids_keep)  # [B, C + V, D]
        scales = ids = [None] * len(self.blocks)
        if self.training and self.drop_path:
            drawn = self.drop_path, len(self.blocks), len(x), x.device
            if self.drop_path_mode == "skip":
                ids = images_to_keep(*drawn)  # each [2, K] or None
            else:
                scales = stochastic_depth(*drawn)  # [depth, 2, B]
        outputs = {}
        for i, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            # frozen ones are in evaluation mode
            dropped = (scales[i], ids[i]) if block.training else (None, None)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *dropped, use_reentrant=False)
            else:
                x = block(x, *dropped)
            if i in wanted:
                outputs[i] = self.split_tokens(x)
        return [outputs[i] for i in wanted]

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """The features of the last block: `forward(images, block_ids=[-1])[0]`."""
        return self(images, block_ids=[-1])[0]

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        norm: bool = True,
        return_class_token: bool = False,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch features of several blocks, called as in DINOv2 (https://github.com/facebookresearch/dinov2).

        Args:
            images: as in `forward`.
            n: the last n blocks, or the ids of the blocks as in `forward`.
            reshape: maps [B, D, H/p, W/p] instead of tokens [B, N, D].
            norm: apply the final LayerNorm to every block's output.
            return_class_token: give pairs (patches, class tokens); there are C class tokens, so theirs is
                [B, C, D]: take the mean over C where DINOv2's single token is expected.

        Returns:
            One tensor (or pair) per block: the last n from shallow to deep, or in the order of the ids.

        Raises:
            ValueError: see `forward`, and n outside 1 to the number of blocks.
        """
        depth = len(self.blocks)
        if isinstance(n, int):
            if not 1 <= n <= depth:
                raise ValueError(f"n = {n}: the encoder has {depth} blocks, ask for 1 to {depth}")
            n = range(depth - n, depth)
        suffix = "_norm" if norm else ""
        outputs = []
        for features in self(images, n):
            patches = features[f"patch_tokens{suffix}"]
            if reshape:
                grid = self.grid_of(*images.shape[-2:])
                patches = patches.transpose(1, 2).unflatten(2, grid)  # [B, D, H/p, W/p]
            outputs.append((patches, features[f"cls_tokens{suffix}"]) if return_class_token else patches)
        return tuple(outputs)

    def resolve_blocks(self, block_ids: Sequence[int] | None) -> list[int]:
        """Block ids counted from the start; None means all.

        Raises:
            ValueError: an id that no block has.
        """
        depth = len(self.blocks)
        if block_ids is None:
            return list(range(depth))
        if unknown := [i for i in block_ids if not -depth <= i < depth]:
            raise ValueError(
                f"block_ids {unknown}: the encoder has {depth} blocks, ids go from {-depth} to {depth - 1}"
            )
        return [i % depth for i in block_ids]

    def split_tokens(self, x: Tensor) -> dict[str, Tensor]:
        """The features of a block from the tokens [B, C + V, D] that leave it, as `forward` returns them."""
        normed = self.norm(x)
        c = self.n_cls_tokens
        return {
            "patch_tokens": x[:, c:],
            "cls_tokens": x[:, :c],
            "patch_tokens_norm": normed[:, c:],
            "cls_tokens_norm": normed[:, :c],
        }

    # Hooks of fine-tuning code, by the names that timm and transformers gave them.

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers leave undecayed in fine-tuning (pre-training decays them)."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for timm's layer decay: the embeddings, each block, the final norm with the last block."""
        with_previous = (99999,)  # timm's code for the group before
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm\.", with_previous)]
        return {"stem": r"^(?:cls_token|pos_embed|patch_embed)", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing on or off, as timm's models do."""
        self.grad_checkpointing = enable

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Turn activation checkpointing on, as transformers' models do; never the reentrant kind."""
        self.grad_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Turn activation checkpointing off."""
        self.grad_checkpointing = False

    def _embed(self, images: Tensor, ids_keep: Tensor | None) -> Tensor:
        images = images[None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images of shape {list(images.shape)}: expected [B, {self.in_chans}, H, W]")
        grid = self.grid_of(*images.shape[-2:])
        positions = resize_positions(self.pos_embed, self.n_cls_tokens, self.grid, grid)  # [1, C + N, D]
        patches = self.patch_embed(images) + positions[:, self.n_cls_tokens :]  # [B, N, D]
        if ids_keep is not None:
            patches = patches.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, self.embed_dim))  # [B, V, D]
        cls = self.cls_token + positions[:, : self.n_cls_tokens]  # [1, C, D]
        return torch.cat([cls.expand(images.shape[0], -1, -1), patches], dim=1)  # [B, C + V, D]
