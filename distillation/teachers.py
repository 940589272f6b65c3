"""The teacher: any encoder, frozen, which sees the whole image; its tokens are taken before its final norm.

Letters: B images, N patches, C class tokens, D width; grids are (rows, columns) in patches.
"""

import math

import torch
import torch.nn.functional as F
from token_losses import Tokens
from torch import Tensor, nn

from pixio.engine.runtime import place_frozen
from pixio.models.external import fingerprint, load_encoder


def load_teacher(
    name: str,
    pretrained: str | None,
    device: torch.device,
    dtype: torch.dtype,
    expected: str | None = None,
) -> nn.Module:
    """Load a teacher for inference under autocast to `dtype`.

    The weights of its matrix products are stored in `dtype`: autocast would convert them to it at every
    forward pass anyway, so that the features are the same bit for bit, in half the memory. Norms, positions
    and class tokens stay float32, and with them the residual stream.

    Args:
        name: `pixio_*`, `timm/NAME` or `hf/FOLDER`.
        pretrained: its weight file; None only for `hf/FOLDER`, which holds them.
        device: where it computes.
        dtype: what autocast computes in there.
        expected: `fingerprint` of the teacher that a run was started with.

    Returns:
        The encoder; its attribute `fingerprint` identifies its weights, whatever `dtype` is.

    Raises:
        FileNotFoundError, ValueError: see `pixio.models.external`; and a teacher without weights, or with
            others than expected.
    """
    if not pretrained and not name.startswith("hf/"):
        raise ValueError(f"--teacher_pretrained is missing: with random weights {name} has nothing to teach")
    teacher = load_encoder(name, pretrained)
    teacher.fingerprint = fingerprint(teacher)
    if expected not in (None, teacher.fingerprint):
        raise ValueError(
            f"the run was started with a teacher of other weights (SHA-256 {expected[:12]}…, now "
            f"{teacher.fingerprint[:12]}…): give that --teacher_pretrained, or choose another --output_dir"
        )
    return place_frozen(teacher, device, dtype)


def check_teacher(teacher: nn.Module, size: int, patch_size: int, n_cls_tokens: int, resize: bool) -> None:
    """Refuse a teacher whose tokens cannot be compared one to one with the students'.

    Args:
        teacher: from `load_teacher`.
        size: side of the square images, in pixels.
        patch_size: of the students, in pixels.
        n_cls_tokens: class tokens of the students that are compared; 0 when none are.
        resize: the teacher's map may be interpolated to the students' grid.

    Raises:
        ValueError: says what differs, and what to do.
    """
    if n_cls_tokens not in (0, teacher.n_cls_tokens):
        raise ValueError(
            f"class tokens are compared one to one, but the teacher has {teacher.n_cls_tokens} and the "
            f"students have {n_cls_tokens}: leave out --n_cls_tokens, or give --loss_fn_cls none"
        )
    if size % teacher.patch_size:
        raise ValueError(
            f"--input_size {size} is not a multiple of the teacher's patch size {teacher.patch_size}; "
            f"multiples of {math.lcm(teacher.patch_size, patch_size)} fit teacher and students"
        )
    if teacher.patch_size != patch_size and not resize:
        theirs, ours = size // teacher.patch_size, size // patch_size
        raise ValueError(
            f"the teacher's patches of {teacher.patch_size} px make a grid of {theirs} x {theirs}, the "
            f"students' of {patch_size} px one of {ours} x {ours}: add --resize_teacher to interpolate the "
            "teacher's map"
        )


@torch.no_grad()
def teacher_tokens(teacher: nn.Module, images: Tensor, grid: tuple[int, int]) -> Tokens:
    """The tokens that the students learn to predict from `images`.

    Args:
        teacher: from `load_teacher`.
        images: float [B, 3, H, W], normalized.
        grid: of the students; a teacher's map on another grid is resized to it (bilinear, antialiased).

    Returns:
        Its last block's tokens before the final norm, float32: [B, C, D], [B, N, D] on `grid`.
    """
    features = teacher(images, block_ids=[-1])[0]
    patches = features["patch_tokens"].float()  # [B, N', D]
    own = teacher.grid_of(*images.shape[-2:])
    if own != grid:
        patches = patches.transpose(1, 2).unflatten(2, own)  # [B, D, h', w']
        patches = F.interpolate(patches, size=grid, mode="bilinear", antialias=True)  # [B, D, h, w]
        patches = patches.flatten(2).transpose(1, 2)  # [B, N, D]
    return Tokens(features["cls_tokens"].float(), patches)
