"""Depth from a frozen encoder: train a linear or DPT head, and measure it (docs/evaluation.md).

    python eval_monodepth.py --config monodepth/configs/nyuv2_dpt.yaml --encoder NAME --pretrained_ckp FILE
    torchrun --nproc_per_node 8 eval_monodepth.py …
    python eval_monodepth.py --config … --encoder … --pretrained_ckp … --head runs/…/head.pth --eval_only

The protocol follows ZoeDepth and DINOv2; loss and windows as in Depth Anything V2
(https://github.com/DepthAnything/Depth-Anything-V2). `dense/run.py` says what a run writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dense.config import DenseConfig
from dense.probe import Task
from dense.run import run
from launch import run_evaluation
from monodepth.data import depth_source
from monodepth.metrics import HIGHER_IS_BETTER, METRICS, DepthScores, silog_loss

from pixio.dense import Depth
from pixio.engine.config import option, parse
from pixio.images.panels import draw_depth

PROGRAM = "eval_monodepth.py"


@dataclass(frozen=True, kw_only=True)
class DepthConfig(DenseConfig):
    """Train a depth head on an encoder, frozen by default, and evaluate it."""

    dataset: Literal["nyuv2", "kitti", "folder"] = option(help="data set in --data_root")
    min_depth: float = option(0.001, "smallest depth that is scored, in meters", gt=0)
    max_depth: float = option(10.0, "largest depth that is scored and can be predicted, in meters", gt=0)
    depth_scale: float | None = option(
        None,
        "depth PNG values per meter; by default 1000 for --dataset folder (.npy files are in meters)",
        gt=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_depth >= self.max_depth:
            raise ValueError(
                f"--min_depth {self.min_depth} must be below --max_depth, which is {self.max_depth}"
            )


def depth_task(config: DepthConfig) -> Task:
    """Depth as a task: one output, whose sigmoid is a share of the farthest depth."""
    limits = {"min_depth": config.min_depth, "max_depth": config.max_depth}
    output = Depth(**limits)
    return Task(
        name="monodepth",
        data=depth_source(
            config.dataset, **limits, units_per_meter=config.depth_scale, upright=config.apply_exif
        ),
        output=output,
        identity={"max_depth": config.max_depth},
        warmup=0.1,
        metrics={metric: metric in HIGHER_IS_BETTER for metric in METRICS},
        loss=lambda logits, target: silog_loss(output.average(logits).squeeze(1), target, **limits),
        make_scores=partial(DepthScores, **limits),
        draw=partial(draw_depth, **limits),
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse and run; returns what `results.json` holds. A mistake ends the program with one line."""
    config = parse(DepthConfig, argv, prog=PROGRAM)
    return run_evaluation(PROGRAM, config, partial(run, config, depth_task(config)))


if __name__ == "__main__":
    main()
