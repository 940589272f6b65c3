"""The layers of Pixio's encoder and decoder: plain pre-norm transformer blocks, with only the options Pixio
uses.

Letters: B images, C channels, H x W pixels, p patch size, N patches, T tokens, D width, K images whose
branch is computed. Parameter names follow timm and MAE (https://github.com/huggingface/pytorch-image-models,
https://github.com/facebookresearch/mae), so that released files load as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Cut images into square patches and project each: [B, C, H, W] -> [B, N, D], patches row by row.

    Attributes:
        img_size, patch_size, grid_size: (rows, columns) of the native input in pixels, of a patch in pixels,
            of the native grid in patches. num_patches: N of the native grid.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.img_size = img_size
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.proj(images)  # [B, D, H/p, W/p]
        return tokens.flatten(2).transpose(1, 2)  # [B, N, D]


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, D] -> [B, T, D]; the fused projection holds q, k, v in this order."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)  # 3 x [B, T, D]; their gradients are joined without a transpose
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        # each [B, heads, T, D/heads]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, T, D]


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them, [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, scales: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Add both branches to `x`.

        Args:
            x: [B, T, D].
            scales: from `stochastic_depth`, [2, B]: factors of the attention and the MLP branch of each
                image; None = 1.
            ids: from `images_to_keep`, int64 [2, K]: the images whose attention and whose MLP branch is
                computed, and scaled by B/K to keep the mean; None = all.
        """
        if ids is not None:
            x = _add_to(x, self.attn(self.norm1(x.index_select(0, ids[0]))), ids[0])
            return _add_to(x, self.mlp(self.norm2(x.index_select(0, ids[1]))), ids[1])
        x = x + _scaled(self.attn(self.norm1(x)), scales, 0)
        return x + _scaled(self.mlp(self.norm2(x)), scales, 1)


def _scaled(x: Tensor, scales: Tensor | None, branch: int) -> Tensor:
    """[B, T, D] times the factors of one of the branches."""
    return x if scales is None else x * scales[branch, :, None, None].to(x.dtype)


def _add_to(x: Tensor, branch: Tensor, ids: Tensor) -> Tensor:
    """[B, T, D], with B/K times a branch [K, T, D] added to the images `ids` [K]."""
    return x.index_add(0, ids, (branch * (len(x) / len(ids))).to(x.dtype))


def stochastic_depth(rate: float, depth: int, batch: int, device: torch.device) -> Tensor:
    """Draw which images skip which branches of `depth` blocks (https://arxiv.org/abs/1603.09382).

    One draw for all blocks, outside of them: compiled or not, they see the same numbers, and one compiled
    block serves every rate.

    Args:
        rate: of the last block; it grows linearly from 0 at the first.
        depth: number of blocks.
        batch: B.
        device: where the blocks are.

    Returns:
        [depth, 2, B]: 0 drops a branch of a block, of an image; the others are scaled to keep the mean.
    """
    keep = 1 - torch.linspace(0, rate, depth, device=device).view(-1, 1, 1)  # a single block keeps all
    return (torch.rand(depth, 2, batch, device=device) < keep) / keep


def images_to_keep(rate: float, depth: int, batch: int, device: torch.device) -> list[Tensor | None]:
    """Draw the images whose branches are computed at all, as DINOv2 does (arXiv 2304.07193, section 4).

    Unlike in `stochastic_depth` their number is fixed: in each branch of a block exactly K of B images, the
    rounded share that its rate leaves, at least one. Each is drawn with probability K/B, but they are not
    independent.

    Args: those of `stochastic_depth`.

    Returns:
        For each block int64 [2, K], its attention and its MLP branch; None = all images.
    """
    order = torch.rand(depth, 2, batch, device=device).argsort(dim=-1)  # [depth, 2, B]
    counts = [max(round(batch * (1 - rate * i / max(depth - 1, 1))), 1) for i in range(depth)]
    kept = [None if count == batch else order[i, :, :count] for i, count in enumerate(counts)]
    for ids in kept:
        if ids is not None:  # one compiled block serves every K
            torch._dynamo.maybe_mark_dynamic(ids, 1)
    return kept


def init_weights(module: nn.Module) -> None:
    """Initialize one layer as MAE does; use with `Module.apply`.

    Linear layers and the patch projection (seen as the matrix [D, C*p*p]) are Xavier-uniform. Linear biases
    start at zero; the projection's bias and LayerNorm (the identity) keep torch's default.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """MAE's fixed position table: sines and cosines of the column, then of the row.

    Args:
        grid: (h, w) in patches.
        dim: D, a multiple of 4.

    Returns:
        float32 [1, h*w, D], patches row by row.

    Raises:
        ValueError: another D.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, found {dim}")
    rates = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))  # radians per patch [D/4]
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")  # 2 x [h, w]
    angles = [place.flatten().unsqueeze(-1) * rates for place in (columns, rows)]  # 2 x [h*w, D/4]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=-1)[None]


def resize_positions(
    positions: Tensor, n_cls: int, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Resize the patch part of a position embedding to another grid; the class part is kept.

    Bicubic, `align_corners=False`, no antialiasing, computed in float32. The native grid is returned
    untouched.

    Args:
        positions: [1, n_cls + h*w, D], class positions first, then the patches row by row.
        n_cls: number of class tokens.
        old_grid: (h, w) in patches.
        new_grid: (h', w') in patches.

    Returns:
        [1, n_cls + h'*w', D], in the dtype of `positions`.
    """
    # An exported program must serve any size: there the resizing always runs, at the native grid as identity.
    if not torch.compiler.is_exporting() and old_grid == new_grid:
        return positions
    patches = positions[:, n_cls:].unflatten(1, old_grid).permute(0, 3, 1, 2).float()  # [1, D, h, w]
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)  # [1, D, h', w']
    patches = patches.flatten(2).transpose(1, 2).to(positions.dtype)  # [1, h'*w', D]
    return torch.cat([positions[:, :n_cls], patches], dim=1)  # [1, n_cls + h'*w', D]
