"""`pixio …`: models, weights, features, pictures and rendered scenes from the command line.

Each command is a dataclass of its options with a method `run`, which imports the modules that do the work.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pixio.cli import visualize
from pixio.cli.doctor import Doctor
from pixio.cli.explore import Explore
from pixio.cli.features import Features
from pixio.cli.predict import Predict
from pixio.engine.config import option, parse_command
from pixio.engine.program import explain, lasting_output


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print sizes and parameter counts."""

    example = "pixio_vith16"
    models: tuple[str, ...] = option((), "names; all if omitted", positional=True)

    def run(self) -> None:
        import torch

        import pixio

        lines = [f"{'model':<42}{'width':>6}{'blocks':>7}{'heads':>6}{'encoder':>15}{'decoder':>13}"]
        for name in self.models or [*pixio.list_models(), *pixio.list_models(pretraining=True)]:
            with torch.device("meta"):
                model = pixio.create_model(name)
            encoder: Any = getattr(model, "encoder", model)
            size = sum(p.numel() for p in encoder.parameters())
            decoder = sum(p.numel() for p in model.parameters()) - size
            shape = f"{encoder.embed_dim:>6}{len(encoder.blocks):>7}{encoder.num_heads:>6}"
            lines.append(f"{name:<42}{shape}{size:>15,}{f'{decoder:,}' if decoder else '':>13}")
        print("\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert an encoder for another library, or encoder and head into one ONNX model.

    Prints a line of Python that loads the result, and any differences from Pixio's own model. A head.pth
    converts only to onnx; that model maps RGB pixels, uint8 [B, 3, H, W], to depth in meters or classes
    [B, H, W].
    """

    example = "pixio_vith16.pth pixio-vith16 --to transformers"
    source: str = option(help="weight file, folder, Hugging Face repository, or head.pth", positional=True)
    target: str = option(help="file or folder to write", positional=True)
    to: str = option(help="{choices}", metavar="FORMAT", choices="pixio.weights.export:FORMATS")
    num_heads: int | None = option(None, "number of attention heads, if the source does not say", ge=1)
    batch: int | None = option(None, "onnx: fixed batch size; any if omitted", ge=1)
    size: tuple[int, int] | None = option(
        None, "onnx: fixed input size in pixels; any if omitted", metavar=("H", "W"), ge=1
    )
    cls: Literal["all", "mean"] = option(
        "all", "mean: replace the class tokens by their mean, for code that expects one (transformers' DPT)"
    )

    pretrained: str | None = option(
        None, "for a head: weights of its encoder; by default the path stored in the head"
    )

    def run(self) -> None:
        import pixio
        from pixio.dense import Predictor, is_head
        from pixio.dense.export import write_onnx
        from pixio.weights.export import check_target, export

        check_target(self.target, self.to)  # before anything is downloaded
        if is_head(self.source):
            if self.to != "onnx" or self.cls != "all" or self.num_heads:
                raise ValueError(f"{self.source} is a head: use --to onnx, without --cls and --num_heads")
            predictor = Predictor.from_pretrained(self.source, self.pretrained, device="cpu")
            print(write_onnx(predictor, self.target, self.batch, self.size))
            return
        if self.pretrained:
            raise ValueError(f"{self.source} is not a head, and --pretrained is only for heads: leave it out")
        model = pixio.from_pretrained(self.source, self.num_heads, dtype=None)
        print(export(model, self.target, self.to, self.batch, self.size, self.cls))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimate what training needs: memory for each way of sharding, FLOPs, seconds per step, GPU-hours.

    For several models, the students of a distillation, the estimate is for all of them together.
    """

    example = "pixio_vit5b16_enc3072x48h32_dec512x32h16 --gpus 256 --batch 64 --steps 1284000"
    models: tuple[str, ...] = option(
        help="pre-training model, or the encoders to distill from --teacher; see `pixio info`",
        positional=True,
    )
    teacher: str | None = option(None, "teacher from which the models are distilled")
    gpus: int = option(1, "number of GPUs, one process each", ge=1)
    gpus_per_node: int = option(8, "GPUs per node", ge=1)
    card: str = option("h100", "kind of GPU: {choices}", choices="pixio.cli.plan:CARDS")
    gpu_memory: float | None = option(None, "memory of each GPU in GiB; by default that of the card", gt=0)
    batch: int = option(64, "images per GPU and forward pass", ge=1)
    accum_iter: int = option(1, "forward passes per step", ge=1)
    steps: int | None = option(None, "optimizer steps of the run, to estimate its hours", ge=1)
    mfu: float = option(
        0.4, "model FLOPs utilization: the share of the card's bf16 peak that is reached", gt=0, le=1
    )
    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", "autocast dtype")
    mask_ratio: float | None = option(
        None, "share of masked cells; by default 0.75 for pre-training models, else 0", ge=0, lt=1
    )

    def run(self) -> None:
        from pixio.cli.plan import CARDS, cost_of, describe, describe_cost, make_plan

        where = (self.gpus, self.batch)
        plan = make_plan(
            self.models, *where, self.dtype, self.mask_ratio, self.gpus_per_node, teacher=self.teacher
        )
        print(describe(plan, self.gpu_memory or CARDS[self.card][0]))
        if self.dtype != "fp32":
            cost = cost_of(plan, self.card, self.mfu, *where, self.accum_iter, self.steps)
            print(describe_cost(cost, self.card, self.mfu, self.gpus))


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Render labeled indoor scenes in the layout of a real data set."""

    example = "imagenet-tars data/scenes --train 2000 --val 200 --size 128"
    layout: str = option(help="{choices}", positional=True, choices="pixio.synthetic.layouts:LAYOUTS")
    root: str = option(help="folder to create", positional=True)
    train: int = option(1000, "training images", ge=0)
    val: int | None = option(None, "validation images; by default 100 if the layout has any", ge=0)
    size: int = option(128, "side of the rendered images in pixels", ge=1)
    seed: int = option(0, "random seed of the scenes", ge=0)
    workers: int = option(0, "worker processes", ge=0)

    def run(self) -> None:
        from pixio.synthetic.trees import write_tree

        made = write_tree(self.layout, self.root, self.train, self.val, self.size, self.seed, self.workers)
        print(
            f"{made.train} training and {made.val} validation images in {made.root}, layout {made.layout}: "
            f"{made.files} files, {made.written} of them written now"
        )


COMMANDS = {
    "info": Info,
    "convert": Convert,
    "features": Features,
    "predict": Predict,
    "explore": Explore,
    **visualize.COMMANDS,
    "plan": Plan,
    "scenes": Scenes,
    "doctor": Doctor,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends it with one line and exit status 2."""
    with lasting_output():
        command = parse_command(COMMANDS, argv, "pixio", "Models, weights, features and pictures of Pixio.")
        name = next(name for name, cls in COMMANDS.items() if cls is type(command))
        try:
            command.run()
        except (ValueError, OSError, ImportError) as error:
            print(f"pixio {name}: error: {' '.join(explain(error, 'cli').split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"pixio {name}: interrupted", file=sys.stderr)
            sys.exit(130)
