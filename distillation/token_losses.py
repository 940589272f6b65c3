"""How far a student's tokens are from its teacher's.

Letters: B images, C class tokens, V compared patches, D teacher width.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Literal["cosine", "l1", "mse"]


class Tokens(NamedTuple):
    """Class tokens [B, C, D] and patch tokens [B, V, D], patches row by row."""

    cls: Tensor
    patch: Tensor

    @staticmethod
    def split(tokens: Tensor, n_cls_tokens: int) -> "Tokens":
        """Of tokens [B, C + V, D], class tokens first."""
        return Tokens(tokens[:, :n_cls_tokens], tokens[:, n_cls_tokens:])


class TokenLoss(NamedTuple):
    """A loss and its terms, scalars; the class term is 0 where class tokens are not compared."""

    total: Tensor
    cls: Tensor
    patch: Tensor


def token_loss(
    student: Tokens,
    teacher: Tokens,
    loss_fn_cls: Literal["none"] | Distance = "cosine",
    loss_fn_patch: Distance = "cosine",
    loss_fuse: Literal["sum", "avg"] = "avg",
) -> TokenLoss:
    """Compare class tokens one to one and patch tokens one to one, in float32.

    Args:
        student, teacher: equally many patches; equally many class tokens, unless `loss_fn_cls` is "none".
        loss_fn_cls: "cosine" is 1 - the mean cosine similarity; "l1" and "mse" are means over all elements;
            "none" leaves the class tokens out, and the total is the patch term alone.
        loss_fn_patch: likewise.
        loss_fuse: "avg" gives both terms the same weight; "sum" weights them by their tokens,
            (C * class term + V * patch term) / (C + V): every token counts the same.
    """
    patch = _distance(loss_fn_patch, student.patch, teacher.patch)
    if loss_fn_cls == "none":
        return TokenLoss(patch, torch.zeros_like(patch), patch)
    cls = _distance(loss_fn_cls, student.cls, teacher.cls)
    if loss_fuse == "avg":
        return TokenLoss((cls + patch) / 2, cls, patch)
    n_cls, n_patch = student.cls.shape[1], student.patch.shape[1]
    return TokenLoss((n_cls * cls + n_patch * patch) / (n_cls + n_patch), cls, patch)


def _distance(name: Distance, student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.float(), teacher.float()
    if name == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()
    return F.l1_loss(student, teacher) if name == "l1" else F.mse_loss(student, teacher)
