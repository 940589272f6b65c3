"""The students: encoders with a projector to the teacher's width, their objective, and what trains them.

Letters: B images, N patches, V visible patches, C class tokens, d student width, D teacher width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from distill_config import DistillConfig
from teachers import check_teacher
from token_losses import TokenLoss, Tokens, token_loss
from torch import Tensor, nn

import pixio
from pixio.engine.checkpoint import restore
from pixio.engine.optim import make_adamw
from pixio.engine.runtime import Runtime
from pixio.engine.step import StepResult
from pixio.models.encoder import PixioViT
from pixio.models.health import HealthWatch
from pixio.models.layers import init_weights
from pixio.models.masking import block_mask, cell_grid, count_kept, split_patches
from pixio.weights.loading import assign
from pixio.weights.reading import read_file
from pixio.weights.wrappers import split_state


class Student(nn.Module):
    """An encoder, and a projector from its width d to the teacher's; only the encoder outlives the run.

    Args:
        encoder: trained in place; the projector follows its final norm.
        teacher_dim: width D.

    Attributes:
        health: of the encoder, on the patches of the newest images.
    """

    def __init__(self, encoder: PixioViT, teacher_dim: int):
        super().__init__()
        self.encoder = encoder
        # what all tokens of its teacher share is learned first, and for that time is all there is
        self.health = HealthWatch("the student", patience=10)
        self.last_proj = nn.Sequential(
            nn.Linear(encoder.embed_dim, teacher_dim),
            nn.LayerNorm(teacher_dim),
            nn.GELU(),
            nn.Linear(teacher_dim, teacher_dim),
        ).apply(init_weights)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tokens:
        """Project the tokens of `images`, or of their patches `ids_keep`.

        Args:
            images: float [B, 3, H, W], normalized.
            ids_keep: int64 [B, V]; None means all.

        Returns:
            Projected tokens, [B, C, D] and [B, V, D].
        """
        features = self.encoder(images, [-1], ids_keep)[0]
        self.health.keep(features["patch_tokens"].detach())
        # one after the other: FSDP2 warns of outputs that are parts of one tensor
        return Tokens(
            self.last_proj(features["cls_tokens_norm"]), self.last_proj(features["patch_tokens_norm"])
        )

    def load(self, path: str) -> None:
        """Start from the encoder in a file, and from the projector where it holds one, as the release's do.

        Raises:
            FileNotFoundError, ValueError: see `pixio.weights`; weights that do not fit.
        """
        encoder, beside = split_state(read_file(path), path)
        found = self.state_dict() | beside
        projector = {key: value for key, value in found.items() if key.startswith("last_proj.")}
        assign(self, {f"encoder.{key}": value for key, value in encoder.items()} | projector, path)


class Batch(NamedTuple):
    """What all students of a run share of a micro batch.

    images: float [B, 3, H, W], normalized. targets: the teacher's tokens of the whole images.
    noise: [B, cells], draws the masks of all students; None lets each draw its own.
    """

    images: Tensor
    targets: Tokens
    noise: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The loss of one student: `objective(model, batch)`.

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

    def __call__(self, model: nn.Module, batch: Batch) -> TokenLoss:
        """Compare class tokens and visible patches with the teacher's."""
        images, targets, noise = batch
        if self.mask_ratio == 0:
            return token_loss(model(images), targets, **self.losses)
        if noise is None:
            noise = torch.rand(len(images), self.n_cells, device=images.device)
        mask = block_mask(noise, self.grid, self.mask_grid, self.mask_ratio)  # [B, N]
        ids_keep, _ = split_patches(mask, self.n_visible)  # [B, V]
        index = ids_keep.unsqueeze(-1).expand(-1, -1, targets.patch.shape[-1])  # [B, V, D]
        visible = Tokens(targets.cls, targets.patch.gather(1, index))  # [B, V, D]
        return token_loss(model(images, ids_keep), visible, **self.losses)


class StudentTrainer:
    """One student of a run with its objective, optimizer and gradient scaler.

    Args:
        name: among the students of the run.
        student: trained in place.
        objective: its loss.
        peak_lr: top of its schedule.
        runtime: the ranks.
        weight_decay: of its optimizer.
        activation_checkpointing, compile: see `Runtime.wrap`.
    """

    def __init__(
        self,
        name: str,
        student: Student,
        objective: Objective,
        peak_lr: float,
        runtime: Runtime,
        weight_decay: float,
        activation_checkpointing: bool = False,
        compile: bool | None = False,
    ):
        self.name, self.student, self.objective, self.peak_lr = name, student, objective, peak_lr
        self.model = runtime.wrap(student, activation_checkpointing, compile).train()
        self.optimizer = make_adamw(student, peak_lr, weight_decay=weight_decay)
        self.scaler = runtime.make_scaler()
        self._terms: list[Tensor] = []

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """The objective as a scalar; its terms are kept for `pop_terms`."""
        loss = self.objective(model, batch)
        self._terms.append(torch.stack([loss.cls, loss.patch]).detach())
        return loss.total

    def pop_terms(self) -> Tensor:
        """Class and patch loss [2] on the device: their means since the last time."""
        terms, self._terms = torch.stack(self._terms).mean(0), []
        return terms

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "model": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state_dict` was taken."""
        restore(self.student, self.optimizer, state, self.scaler)


def student_metrics(
    runtime: Runtime,
    trainers: Sequence[StudentTrainer],
    results: Mapping[str, StepResult],
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """Collective: what a step logs of each student, the mean of their losses and the highest rate."""
    terms = runtime.mean(torch.stack([trainer.pop_terms() for trainer in trainers]))  # [students, 2]
    return {
        "loss": lambda: sum(result.loss.item() for result in results.values()) / len(results),
        "lr": max(rates.values()),
        "students": {
            name: {
                "loss": result.loss,
                "loss_cls": cls,
                "loss_patch": patch,
                "lr": rates[name],
                "grad_norm": result.grad_norm,
                "health": trainer.student.health.measure,
            }
            for trainer, (name, result), (cls, patch) in zip(trainers, results.items(), terms, strict=True)
        },
    }


def exports_of(
    names: Iterable[str], folder: Path
) -> dict[Path, Callable[[dict[str, Any]], dict[str, Tensor]]]:
    """What a checkpoint makes of each student in `folder`: `encoder_NAME.pth` and `projector_NAME.pth`."""
    return {
        folder / f"{part}_{name}.pth": partial(_export, name, prefix)
        for part, prefix in (("encoder", "encoder."), ("projector", "last_proj."))
        for name in names
    }


def _export(name: str, prefix: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """The encoder or the projector of a student, both under the released keys."""
    weights = state["students"][name]["model"]
    return {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith(prefix)}


def make_trainer(config: DistillConfig, runtime: Runtime, teacher: nn.Module, i: int) -> StudentTrainer:
    """The `i`-th student with its own optimizer, schedule, depth and masks.

    Raises:
        ValueError: its tokens cannot be compared with the teacher's, or a file to start from does not fit.
    """
    name = config.student_models[i]
    n_cls_tokens = config.n_cls_tokens or teacher.n_cls_tokens or 8

    def build() -> Student:
        encoder = pixio.create_model(
            name,
            img_size=config.input_size,
            n_cls_tokens=n_cls_tokens,
            drop_path=config.of(i, "drop_path"),
            drop_path_mode=config.drop_path_mode,
        )
        if config.position_init == "sincos":
            encoder.start_from_sincos()
        compared = n_cls_tokens if config.loss_fn_cls != "none" else 0
        check_teacher(teacher, config.input_size, encoder.patch_size, compared, config.resize_teacher)
        student = Student(encoder, teacher.embed_dim)
        if config.init_students:
            student.load(config.init_students[i])
        return student

    runtime.seed(config.seed, 0, name)
    student = runtime.build(build)
    losses = {key: getattr(config, key) for key in ("loss_fn_cls", "loss_fn_patch", "loss_fuse")}
    objective = Objective(student.encoder.grid, config.of(i, "mask_ratio"), config.mask_grid, losses)
    return StudentTrainer(
        name,
        student,
        objective,
        config.peak_lr(runtime.world_size, i),
        runtime,
        config.weight_decay,
        config.grad_checkpointing,
        config.compile,
    )
