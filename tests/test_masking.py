"""Block masks: properties over grids, cells, ratios and noise."""

from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixio.models.masking import block_mask, cell_grid, count_kept, split_patches


@st.composite
def masks(draw):
    """(mask [B, N], grid, mask_grid, cells kept) from random noise."""
    side, rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    ratio = float(draw(st.decimals(0, 1, places=2)))
    noise = torch.rand(
        3, rows * columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    )
    grid = (rows * side, columns * side)
    return block_mask(noise, grid, side, ratio), grid, side, count_kept(rows * columns, ratio)


@settings(deadline=None, max_examples=60)
@given(masks())
def test_masks_are_whole_cells_and_exactly_as_many_in_every_image(case):
    mask, (h, w), side, kept = case
    cells = mask.view(-1, h // side, side, w // side, side)
    assert torch.equal(cells.amin(dim=(2, 4)), cells.amax(dim=(2, 4)))
    kept_per_image = (cells[:, :, 0, :, 0] == 0).flatten(1).sum(dim=1)
    assert kept_per_image.tolist() == [kept] * 3


@settings(deadline=None, max_examples=60)
@given(masks())
def test_split_is_a_partition_and_restore_puts_it_back(case):
    mask, *_ = case
    visible = int((mask[0] == 0).sum())
    keep, restore = split_patches(mask, visible)
    assert keep.shape == (3, visible)
    assert mask.gather(1, keep).eq(0).all()
    patches = torch.arange(mask.shape[1]).expand_as(mask)
    hidden = torch.stack([p[m == 1] for p, m in zip(patches, mask, strict=True)])
    assert torch.equal(torch.cat([keep, hidden], dim=1).gather(1, restore), patches)


@settings(deadline=None)
@given(st.integers(1, 1024), st.decimals(0, 1, places=3))
def test_count_is_exact_in_decimal_arithmetic(cells, ratio):
    assert count_kept(cells, float(ratio)) == int(cells * (1 - Decimal(ratio)))


@pytest.mark.parametrize(
    ("cells", "ratio", "kept"), [(20, 0.8, 4), (16, 0.75, 4), (64, 0.75, 16), (10, 0.9, 1)]
)
def test_float_truncation_loses_no_cell(cells, ratio, kept):
    assert count_kept(cells, ratio) == kept


def test_the_smallest_noise_stays_visible():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.7]])
    assert block_mask(noise, (4, 4), 2, 0.75).view(4, 4).tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]


@pytest.mark.parametrize(("ratio", "value"), [(0, 0), (1, 1)])
def test_extreme_ratios_keep_everything_or_nothing(ratio, value):
    mask = block_mask(torch.rand(2, 16), (16, 16), 4, ratio)
    assert mask.eq(value).all()
    assert split_patches(mask, 256 * (1 - value))[0].shape == (2, 256 * (1 - value))


def test_every_cell_is_kept_equally_often():
    torch.manual_seed(0)
    share = (block_mask(torch.rand(20_000, 16), (16, 16), 4, 0.75) == 0).float().mean(dim=0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 20_000) ** 0.5


@pytest.mark.parametrize("grid", [(14, 14), (16, 14)])
def test_a_grid_that_the_cells_do_not_divide_is_refused_with_the_choices(grid):
    with pytest.raises(ValueError, match=r"mask_grid 4 does not divide.*choose one of \[1, 2"):
        cell_grid(grid, 4)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="not in"):
        count_kept(16, ratio)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 9\].*expected \[B, 16\]"):
        block_mask(torch.rand(2, 9), (16, 16), 4, 0.75)
