"""Settings of depth and segmentation alike."""

from dataclasses import dataclass
from typing import Literal

from training_loop import TrainingConfig

from pixio.dense.heads import KINDS, WIDTH
from pixio.engine.config import option


@dataclass(frozen=True, kw_only=True)
class DenseConfig(TrainingConfig):
    """Settings of depth and segmentation alike; the published ones are the YAML files."""

    encoder: str = option("pixio_vith16", "pixio_…, timm/NAME or hf/FOLDER", aliases=("model",))
    cls_concat: Literal["mean", "none"] = option(
        "mean", "mean: append the mean of the class (and register) tokens to each patch token; none: do not"
    )
    # data
    data_root: str = option("", "folder with the data set")
    train_split_file: str | None = option(
        None, "file of `IMAGE TARGET` lines, instead of the standard training split"
    )
    val_split_file: str | None = option(None, "the same for the validation split")
    expect_count: bool = option(
        False, "fail, instead of warning, if the number of images is not the published one"
    )
    apply_exif: bool = option(
        False, "apply EXIF orientation to images, for targets that match upright photos"
    )
    # head
    head: str = option("dpt", "linear, dpt, or the file of a trained head for --eval_only")
    dpt_width: int = option(WIDTH, "channels of a DPT head, as published; fewer are faster", ge=1)
    eval_only: bool = option(False, "only evaluate --head FILE, without training")
    crop_size: int = option(
        256, "size of crops and windows in pixels, rounded down to a multiple of the patch size", ge=1
    )
    # evaluation
    window_batch: int = option(16, "windows per forward pass; affects only speed and memory", ge=1)
    panels: int = option(4, "validation images in panels.png; 0 = no picture", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_only and self.head in KINDS:
            raise ValueError(f"--eval_only needs the file of a trained head, found --head {self.head}")
        if not self.eval_only and self.head not in KINDS:
            kinds = " nor ".join(KINDS)
            raise ValueError(f"--head {self.head} is neither {kinds}; a trained head needs --eval_only")
        if self.dpt_width != WIDTH and self.head != "dpt":
            raise ValueError(f"--dpt_width {self.dpt_width} needs --head dpt, found --head {self.head}")
