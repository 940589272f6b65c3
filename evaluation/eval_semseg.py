"""Segmentation from a frozen encoder: train a linear or DPT head, and measure it (docs/evaluation.md).

    python eval_semseg.py --config semseg/configs/ade20k_linear.yaml --encoder NAME --pretrained_ckp FILE
    torchrun --nproc_per_node 8 eval_semseg.py …
    python eval_semseg.py --config … --encoder … --pretrained_ckp … --head runs/…/head.pth --eval_only

The protocol follows UniMatch V2 (https://github.com/LiheYoung/UniMatch-V2). `dense/run.py` says
what a run writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dense.config import DenseConfig
from dense.probe import Task
from dense.run import run
from launch import run_evaluation
from semseg.data import CLASS_NAMES, mask_source
from semseg.metrics import IGNORE, SegmentationScores, segmentation_loss

from pixio.dense import Classes
from pixio.engine.config import option, parse
from pixio.images.panels import draw_classes

PROGRAM = "eval_semseg.py"


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(DenseConfig):
    """Train a segmentation head on an encoder, frozen by default, and evaluate it."""

    dataset: Literal["ade20k", "pascal", "loveda", "folder"] = option(help="data set in --data_root")
    nclass: int = option(
        help="number of classes; masks hold 0 to nclass - 1, or 255 = ignored", ge=1, le=IGNORE
    )
    class_names: tuple[str, ...] = option((), "names of the classes, for --dataset folder")
    reduce_zero_label: bool = option(
        False, "class ids in masks start at 1 and 0 is ignored, as in the original annotations of ADE20K"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.names) != self.nclass:
            raise ValueError(
                f"--nclass is {self.nclass}, but {self.dataset} has {len(self.names)} class names"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; numbered where there are none."""
        numbered = tuple(f"class {c}" for c in range(self.nclass))
        return self.class_names or tuple(CLASS_NAMES.get(self.dataset, numbered))


def segmentation_task(config: SegmentationConfig) -> Task:
    """Segmentation as a task: one output per class."""
    output = Classes.of(config.names)
    return Task(
        name="semseg",
        data=mask_source(config.dataset, config.nclass, config.reduce_zero_label, config.apply_exif),
        output=output,
        identity={},
        warmup=0.0,
        metrics={"miou": True},
        loss=segmentation_loss,
        make_scores=partial(SegmentationScores, config.nclass),
        draw=partial(draw_classes, names=output.names, colors=output.colors),
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse and run; returns what `results.json` holds. A mistake ends the program with one line."""
    config = parse(SegmentationConfig, argv, prog=PROGRAM)
    return run_evaluation(PROGRAM, config, partial(run, config, segmentation_task(config)))


if __name__ == "__main__":
    main()
