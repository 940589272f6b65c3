"""Block masking: pure functions from random noise to which patches stay, which go, and how to restore the
order.

The patch grid is cut into square cells of `mask_grid` x `mask_grid` patches; whole cells are kept or masked
(paper, section 3; with `mask_grid` 1 it is the masking of MAE). Letters: B images, N patches, V visible
patches.
"""

from fractions import Fraction

import torch
from torch import Tensor


def cell_grid(grid: tuple[int, int], mask_grid: int) -> tuple[int, int]:
    """Cells per column and per row for a patch grid (h, w).

    Raises:
        ValueError: `mask_grid` does not divide both sides of the grid.
    """
    h, w = grid
    if mask_grid < 1 or h % mask_grid or w % mask_grid:
        fitting = [g for g in range(1, min(grid) + 1) if h % g == 0 and w % g == 0]
        raise ValueError(
            f"mask_grid {mask_grid} does not divide the patch grid {h} x {w}; "
            f"choose one of {fitting} or another input size"
        )
    return h // mask_grid, w // mask_grid


def count_kept(cells: int, mask_ratio: float) -> int:
    """Number of cells kept: floor(cells * (1 - mask_ratio)) in exact decimal arithmetic (20 cells at 0.8 keep
    4).

    Raises:
        ValueError: the ratio is outside [0, 1].
    """
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"mask_ratio {mask_ratio} is not in [0, 1]")
    return int(cells * (1 - Fraction(str(float(mask_ratio)))))


def block_mask(noise: Tensor, grid: tuple[int, int], mask_grid: int, mask_ratio: float) -> Tensor:
    """Mask of whole cells, an independent one per image: the cells with the smallest noise are kept.

    Args:
        noise: [B, cells], any real numbers, one per cell, cells row by row.
        grid: (h, w) of the image in patches, N = h * w.
        mask_grid: side of a cell in patches.
        mask_ratio: share of masked cells.

    Returns:
        float32 [B, N], patches row by row: 0 = kept, 1 = masked. Every row has the same number of zeros.

    Raises:
        ValueError: an impossible grid or ratio, or noise of another shape.
    """
    rows, columns = cell_grid(grid, mask_grid)
    if noise.ndim != 2 or noise.shape[1] != rows * columns:
        raise ValueError(
            f"noise of shape {list(noise.shape)}: expected [B, {rows * columns}], one number per cell"
        )
    kept = noise.argsort(dim=1)[:, : count_kept(rows * columns, mask_ratio)]  # [B, kept cells]
    mask = torch.ones(noise.shape, device=noise.device).scatter(1, kept, 0.0)  # [B, cells]
    mask = mask.unflatten(1, (rows, columns))  # [B, rows, columns]
    mask = mask.repeat_interleave(mask_grid, 1).repeat_interleave(mask_grid, 2)  # [B, h, w]
    return mask.flatten(1)  # [B, N]


def split_patches(mask: Tensor, n_visible: int) -> tuple[Tensor, Tensor]:
    """Which patches stay, and where each patch is found once the visible ones are moved to the front.

    Args:
        mask: [B, N], 0 = kept, 1 = masked, with `n_visible` zeros in every row.
        n_visible: V, given as a number so that shapes need no device synchronization.

    Returns:
        ids_keep: int64 [B, V], indices of the visible patches in ascending order.
        ids_restore: int64 [B, N]; `gather(cat([visible, masked]), ids_restore)` is in the original order.
    """
    order = mask.argsort(dim=1, stable=True)  # [B, N], visible patches first
    return order[:, :n_visible], order.argsort(dim=1)
