"""Settings of depth and segmentation alike."""

from dataclasses import dataclass
from typing import Literal

from training_loop import TrainingConfig

from pixio.dense import KINDS
from pixio.engine.config import option


@dataclass(frozen=True, kw_only=True)
class DenseConfig(TrainingConfig):
    """Settings of depth and segmentation alike; the published ones are the YAML files."""

    encoder: str = option("pixio_vith16", "pixio_…, timm/NAME or hf/FOLDER", aliases=("model",))
    cls_concat: Literal["mean", "none"] = option(
        "mean", "what stands beside each patch token: the mean of the class (and register) tokens, or nothing"
    )
    # data
    data_root: str = option("", "folder of the data set")
    train_split_file: str | None = option(None, "list of `IMAGE TARGET` lines instead of the data set's rule")
    val_split_file: str | None = option(None, "the same for validation")
    expect_count: bool = option(False, "another number of images than published is an error, not a warning")
    apply_exif: bool = option(False, "turn images as EXIF says, for targets made on upright ones")
    # head
    head: str = option("dpt", "linear, dpt, or the file of a trained head for --eval_only")
    eval_only: bool = option(False, "train nothing: evaluate --head FILE")
    crop_size: int = option(
        256, "side of crops and windows, lowered to a multiple of the patch size; pixels", ge=1
    )
    # evaluation
    window_batch: int = option(
        16, "windows that go through the network together; changes nothing but speed", ge=1
    )
    panels: int = option(4, "validation images in panels.png; 0 = no picture", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_only and self.head in KINDS:
            raise ValueError(f"--eval_only needs the file of a trained head, found --head {self.head}")
        if not self.eval_only and self.head not in KINDS:
            kinds = " nor ".join(KINDS)
            raise ValueError(f"--head {self.head} is neither {kinds}; a trained head needs --eval_only")
