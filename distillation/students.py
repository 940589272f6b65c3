"""The students: encoders with a projector to the teacher's width, and what one of them learns from a batch.

Letters: B images, N patches, V visible patches, C class tokens, d student width, D teacher width.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from token_losses import Tokens, token_loss
from torch import Tensor, nn

from pixio.engine.checkpoint import restore
from pixio.engine.optim import make_adamw
from pixio.engine.runtime import Runtime
from pixio.engine.step import StepResult
from pixio.models.encoder import PixioViT
from pixio.models.layers import init_weights
from pixio.models.masking import block_mask, cell_grid, count_kept, split_patches


class Student(nn.Module):
    """An encoder, and the projector that speaks the teacher's language; only the encoder outlives the run.

    Args:
        encoder: trained in place; the projector is fed after its final norm.
        teacher_dim: width D.
    """

    def __init__(self, encoder: PixioViT, teacher_dim: int):
        super().__init__()
        self.encoder = encoder
        self.last_proj = nn.Sequential(
            nn.Linear(encoder.embed_dim, teacher_dim),
            nn.LayerNorm(teacher_dim),
            nn.GELU(),
            nn.Linear(teacher_dim, teacher_dim),
        ).apply(init_weights)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tokens:
        """What the student says about `images`, or about their patches `keep`.

        Args:
            images: float [B, 3, H, W], normalized.
            keep: int64 [B, V]; None means all.

        Returns:
            Projected tokens, [B, C, D] and [B, V, D].
        """
        features = self.encoder(images, block_ids=[-1], keep=keep)[0]
        # one after the other: FSDP2 warns of outputs that are parts of one tensor
        return Tokens(
            self.last_proj(features["cls_tokens_norm"]), self.last_proj(features["patch_tokens_norm"])
        )

    @staticmethod
    def part_of(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        """Of a `state_dict()`, the `encoder` or the `projector` (`last_proj.*`) under the released keys."""
        if part == "projector":
            return {name: weights[name] for name in weights if name.startswith("last_proj.")}
        names = [name for name in weights if name.startswith("encoder.")]
        return {name.removeprefix("encoder."): weights[name] for name in names}


class Batch(NamedTuple):
    """What all students of a run share of a micro batch.

    images: float [B, 3, H, W], normalized. targets: the teacher's tokens for the whole images.
    noise: [B, cells], draws the masks of all students; None lets each draw its own.
    """

    images: Tensor
    targets: Tokens
    noise: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """What is asked of one student; `lesson(model, batch)` is its loss.

    Attributes:
        grid: (rows, columns) in patches.
        mask_ratio: share of masked cells; 0 shows the whole image.
        mask_grid: side of a cell in patches.
        losses: the last three arguments of `token_loss`.
    """

    grid: tuple[int, int]
    mask_ratio: float
    mask_grid: int
    losses: dict[str, str]

    def __post_init__(self) -> None:
        if self.mask_ratio and not self.n_visible:
            raise ValueError(
                f"--mask_ratio {self.mask_ratio} leaves none of {self.n_cells} cells visible: lower it"
            )

    @property
    def n_cells(self) -> int:
        """Cells of the patch grid."""
        rows, columns = cell_grid(self.grid, self.mask_grid)
        return rows * columns

    @property
    def n_visible(self) -> int:
        """Patches V that the student sees."""
        return count_kept(self.n_cells, self.mask_ratio) * self.mask_grid**2

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss over the class tokens and the visible patches: a scalar."""
        images, targets, noise = batch
        if self.mask_ratio == 0:
            return token_loss(model(images), targets, **self.losses)
        if noise is None:
            noise = torch.rand(len(images), self.n_cells, device=images.device)
        mask = block_mask(noise, self.grid, self.mask_grid, self.mask_ratio)  # [B, N]
        keep, _ = split_patches(mask, self.n_visible)  # [B, V]
        index = keep.unsqueeze(-1).expand(-1, -1, targets.patch.shape[-1])  # [B, V, D]
        visible = Tokens(targets.cls, targets.patch.gather(1, index))  # [B, V, D]
        return token_loss(model(images, keep), visible, **self.losses)


class StudentTrainer:
    """One student of a run, what it is asked, and all that trains it.

    Args:
        name: among the students of the run.
        student: trained in place.
        lesson: its loss.
        peak_lr: top of its schedule.
        runtime: the ranks.
        weight_decay: of its optimizer.
        compiled: compile it.
        recompute: activations, see `Runtime.wrap`.
    """

    def __init__(
        self,
        name: str,
        student: Student,
        lesson: Objective,
        peak_lr: float,
        runtime: Runtime,
        weight_decay: float,
        compiled: bool = False,
        recompute: bool = False,
    ):
        self.name, self.student, self.lesson, self.peak_lr = name, student, lesson, peak_lr
        self.model = runtime.wrap(student, recompute).train()
        self.optimizer = make_adamw(student, peak_lr, weight_decay=weight_decay)
        self.scaler = runtime.make_scaler()
        if compiled:
            self.model = torch.compile(self.model)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "model": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        restore(self.student, self.optimizer, state)
        self.scaler.load_state_dict(state["scaler"])


def figures_of(results: Mapping[str, StepResult], rates: Mapping[str, float]) -> dict[str, Any]:
    """What a step says to the log: each student's figures, the mean of their losses and the highest rate."""
    return {
        "loss": lambda: sum(result.loss.item() for result in results.values()) / len(results),
        "lr": max(rates.values()),
        "students": {
            name: {"loss": result.loss, "lr": rates[name], "grad_norm": result.grad_norm}
            for name, result in results.items()
        },
    }


def exports_of(
    names: Iterable[str], folder: Path
) -> dict[Path, Callable[[dict[str, Any]], dict[str, Tensor]]]:
    """What a checkpoint makes of each student in `folder`: `encoder_NAME.pth` and `projector_NAME.pth`."""
    return {
        folder / f"{part}_{name}.pth": partial(_export, name, part)
        for part in ("encoder", "projector")
        for name in names
    }


def _export(name: str, part: str, state: dict[str, Any]) -> dict[str, Tensor]:
    return Student.part_of(state["students"][name]["model"], part)
