"""The options of a distillation; per-student ones take one value for all students or one for each."""

from dataclasses import dataclass
from typing import Literal

import pixio
from pixio.engine.config import option
from pixio.engine.training import TrainConfig


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Distill a frozen teacher into smaller encoders. "Per student": one value for all, or one for each."""

    teacher_model: str = option("pixio_vit5b16", "pixio_…, timm/NAME or hf/FOLDER")
    teacher_pretrained: str | None = option(None, "weight file of the teacher; not needed for hf/FOLDER")
    resize_teacher: bool = option(False, "interpolate the teacher's feature map if its patch size differs")
    feature_cache: str | None = option(
        None, "folder for cached teacher features, computed once, without augmentation"
    )
    student_models: tuple[str, ...] = option(
        ("pixio_vit1b16", "pixio_vith16"), "encoders to train, see `pixio info`", aliases=("student_model",)
    )
    init_students: tuple[str, ...] | None = option(
        None, "files to initialize from, one per student: encoders, or the release's STUDENT_latest.pth"
    )
    n_cls_tokens: int | None = option(
        None, "class tokens of the students; by default as many as the teacher has (Pixio: 8)", ge=1
    )
    loss_fn_cls: Literal["none", "cosine", "l1", "mse"] = option("cosine", "loss between class tokens")
    loss_fn_patch: Literal["cosine", "l1", "mse"] = option("cosine", "loss between patch tokens")
    loss_fuse: Literal["sum", "avg"] = option(
        "avg", "avg: both terms have equal weight; sum: all tokens have equal weight"
    )
    mask_ratio: tuple[float, ...] = option(
        (0.5,), "share of masked cells, per student; 0 = whole images", ge=0, lt=1
    )
    mask_grid: int = option(4, "side of a masked cell in patches", ge=1)
    share_masks: bool = option(False, "use the same mask for all students (nested if ratios differ)")
    drop_path: tuple[float, ...] = option(
        (0.0,), "stochastic depth rate of the last block, per student", ge=0, lt=1
    )
    drop_path_mode: Literal["exact", "skip"] = option(
        "exact",
        "exact: drop branches of each image at random; skip: compute them for a fixed number of images only",
    )
    num_workers: int = option(10, "data-loading processes per rank", ge=0)
    lr: tuple[float, ...] | None = option(
        None, "peak learning rate, per student; by default from --blr", gt=0
    )
    blr: tuple[float, ...] = option((1e-3,), "peak learning rate for 256 images per step, per student", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        names, known = self.student_models, pixio.list_models()
        if not names or len(set(names)) < len(names) or not set(names) <= set(known):
            remedy = f"must name different encoders of {', '.join(known)}"
            raise ValueError(f"--student_models {remedy}; found {' '.join(names) or 'none'}")
        for name in ("mask_ratio", "drop_path", "lr", "blr"):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, len(names)):
                remedy = f"takes one value for all or {len(names)}, one for each student"
                raise ValueError(f"--{name} {remedy}; found {len(values)}")
        if self.init_students is not None and len(self.init_students) != len(names):
            raise ValueError(f"--init_students takes {len(names)} files, found {len(self.init_students)}")

    def of(self, student: int, name: str) -> float:
        """The value of a per-student option for one of the students."""
        values = getattr(self, name)
        return values[student if len(values) > 1 else 0]

    def peak_lr(self, world_size: int, student: int = 0) -> float:
        """--lr, or --blr scaled linearly with the images of a step, of one of the students."""
        if self.lr is not None:
            return self.of(student, "lr")
        return self.of(student, "blr") * self.images_per_step(world_size) / 256
