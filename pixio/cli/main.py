"""`pixio …`: models, weights, features, pictures and rendered scenes from the command line.

Each command is a function that reads its flags and calls the module that does the work; heavy modules are
imported by the command that needs them. The commands that draw are in `pixio.cli.visualize`.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from pixio.cli import visualize
from pixio.cli.common import Choices, add_encoder, add_input, load_encoder, make_transform, positive


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends it with one line and exit status 2."""
    parser = _Parser(
        prog="pixio", description="Models, weights, features and pictures of Pixio.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(run: Callable[..., None], example: str) -> argparse.ArgumentParser:
        name = run.__name__
        command = commands.add_parser(
            name,
            help=run.__doc__.split("\n")[0],
            description=inspect.cleandoc(run.__doc__),
            epilog=f"example: pixio {name} {example}",
            formatter_class=_Help,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        return command

    for register in (_add_info, _add_convert, _add_features, *visualize.COMMANDS, _add_plan, _add_scenes):
        register(add)
    arguments = vars(parser.parse_args(argv))
    run = arguments.pop("run")
    try:
        run(**arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough; what is left goes nowhere, without a complaint
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"pixio {run.__name__}: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"pixio {run.__name__}: interrupted\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


def _add_info(add) -> None:
    parser = add(info, "pixio_vith16")
    parser.add_argument("models", nargs="*", help="names; all when left out")


def info(models: list[str]) -> None:
    """Print sizes and parameter counts."""
    import torch

    import pixio

    lines = [f"{'model':<42}{'width':>6}{'blocks':>7}{'heads':>6}{'encoder':>15}{'decoder':>13}"]
    for name in models or [*pixio.list_models(), *pixio.list_models(pretraining=True)]:
        with torch.device("meta"):
            model = pixio.create_model(name)
        encoder = getattr(model, "encoder", model)
        size = sum(p.numel() for p in encoder.parameters())
        rest = sum(p.numel() for p in model.parameters()) - size
        shape = f"{encoder.embed_dim:>6}{len(encoder.blocks):>7}{encoder.num_heads:>6}"
        lines.append(f"{name:<42}{shape}{size:>15,}{f'{rest:,}' if rest else '':>13}")
    print("\n".join(lines))


def _add_convert(add) -> None:
    parser = add(convert, "pixio_vith16.pth pixio-vith16 --to transformers")
    parser.add_argument("source", help="weight file, folder, or Hugging Face repository")
    parser.add_argument("target", help="file or folder to make")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        choices=Choices("pixio.weights.export", "FORMATS"),
        help="%(choices)s",
    )
    parser.add_argument("--num_heads", type=int, help="where the source does not tell")
    parser.add_argument("--batch", type=int, help="onnx: images per batch; any when left out")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="onnx: pixels; any when left out"
    )


def convert(
    source: str, target: str, to: str, num_heads: int | None, batch: int | None, size: list[int] | None
) -> None:
    """Convert an encoder for another library.

    Prints a line of Python that loads the result.
    """
    from pixio.weights import export as exchange

    print(exchange.convert(source, target, to, num_heads, batch, tuple(size) if size else None))


def _add_features(add) -> None:
    parser = add(features, "photos/ --pretrained pixio_vith16.pth --output features --workers 8")
    parser.add_argument(
        "images", nargs="+", help="image files, folders, tars, or quoted patterns with * or **"
    )
    add_encoder(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default="features.npz",
        help=".npz or .safetensors: one file, for a few images; else a folder, where a stopped run goes on",
    )
    parser.add_argument(
        "--arrays",
        nargs="+",
        metavar="ARRAY",
        choices=Choices("pixio.features.extraction", "ARRAYS"),
        default=[],
        help="%(choices)s (see above); the first two when left out",
    )
    parser.add_argument("--blocks", type=int, nargs="+", help="block ids, the first axis then; else the last")
    parser.add_argument("--before_norm", action="store_true", help="leave out the encoder's final norm")
    add_input(parser, "square")
    parser.add_argument("--dtype", default="fp32", help="computed in fp32, bf16 or fp16")
    parser.add_argument("--half", action="store_true", help="stored as float16 instead of float32")
    parser.add_argument(
        "--format",
        default="safetensors",
        metavar="FORMAT",
        choices=Choices("pixio.features.extraction", "FORMATS"),
        help="of a folder: %(choices)s",
    )
    parser.add_argument("--per_file", type=positive, default=256, help="images per file of a folder")
    parser.add_argument("--batch_size", type=positive, default=32, help="images of one size")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")


def features(
    images: list[str],
    model: str | None,
    pretrained: str | None,
    num_heads: int | None,
    device: str,
    output: Path,
    arrays: list[str],
    blocks: list[int] | None,
    before_norm: bool,
    size: int | None,
    fit: str,
    dtype: str,
    half: bool,
    format: str,
    per_file: int,
    batch_size: int,
    workers: int,
) -> None:
    """Write the features of images to files.

    Arrays of each image:
      patch_tokens  map [h, w, D], patches row by row
      embedding     mean class token [D], the recommended global embedding
      cls_tokens    all class tokens [C, D]
      mean_patch    mean patch token [D]
    With --blocks they begin with an axis of blocks.
    """
    import time

    from pixio.engine.runtime import start_runtime
    from pixio.features.extraction import Extractor, Recipe, find_images, write_file, write_folder

    one_file = output.suffix in (".npz", ".safetensors")
    if output.suffix and not one_file:
        raise ValueError(f"--output {output}: end it in .npz or .safetensors, or name a folder without a dot")
    if one_file and not output.parent.is_dir():
        raise ValueError(f"--output {output}: no folder {output.parent} to write to")
    shards = find_images(images, per_file)
    runtime = start_runtime(device, dtype)
    try:
        if one_file and runtime.world_size > 1:
            raise ValueError(f"--output {output}: several processes need a folder to write to")
        encoder = load_encoder(model, pretrained, num_heads).to(runtime.device)
        recipe = Recipe(
            make_transform(encoder, size, fit),
            tuple(dict.fromkeys(arrays)) or Recipe.arrays,
            tuple(blocks) if blocks else None,
            not before_norm,
            half,
        )
        extractor = Extractor(encoder, recipe, runtime, batch_size, workers)
        began = time.monotonic()
        if one_file:
            done = write_file(output, extractor, shards)
        else:
            done = write_folder(output, extractor, shards, format, per_file)
        if runtime.is_main:
            speed = done.computed / max(time.monotonic() - began, 1e-9)
            earlier = f", and {done.earlier} from before" if done.earlier else ""
            print(f"{done.computed} images -> {output}, {speed:.3g} images/s{earlier}")
            if done.errors:
                print(f"{len(done.errors)} cannot be read, first {done.errors[0]}", file=sys.stderr)
    finally:
        runtime.close()


def _add_plan(add) -> None:
    parser = add(plan, "pixio_vit5b16_enc3072x48h32_dec512x32h16 --gpus 256 --gpu_memory 80 --batch 64")
    parser.add_argument("model", help="pre-training model or encoder, see `pixio info`")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs, each with its own process")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="of them in each machine")
    parser.add_argument("--gpu_memory", type=float, required=True, help="of each GPU, in GiB")
    parser.add_argument("--batch", type=int, default=64, help="images per GPU and forward pass")
    parser.add_argument("--dtype", default="bf16", help="computed in bf16, fp16 or fp32")
    parser.add_argument("--mask_ratio", type=float, default=0.75, help="share of masked cells")


def plan(
    model: str,
    gpus: int,
    gpus_per_node: int,
    gpu_memory: float,
    batch: int,
    dtype: str,
    mask_ratio: float,
) -> None:
    """Tell what training a model needs: memory for each way of dividing it, and arithmetic."""
    from pixio.cli.plan import describe, make_plan

    print(describe(make_plan(model, gpus, batch, dtype, mask_ratio, gpus_per_node), gpu_memory))


def _add_scenes(add) -> None:
    parser = add(scenes, "imagenet-tars data/scenes --train 2000 --val 200 --size 128")
    parser.add_argument(
        "layout",
        metavar="layout",
        choices=Choices("pixio.synthetic.trees", "LAYOUTS"),
        help="%(choices)s",
    )
    parser.add_argument("root", help="folder to make")
    parser.add_argument("--train", type=int, default=1000, help="training images")
    parser.add_argument("--val", type=int, default=100, help="validation images")
    parser.add_argument("--size", type=int, default=128, help="pixels per side that are rendered")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--workers", type=int, default=0, help="processes")


def scenes(layout: str, root: str, train: int, val: int, size: int, seed: int, workers: int) -> None:
    """Render labelled indoor scenes in the layout of a real data set."""
    from pixio.synthetic.trees import write_tree

    made = write_tree(layout, root, train, val, size, seed, workers)
    print(
        f"{made.train} training and {made.val} validation images in {made.root}, layout {made.layout}: "
        f"{made.files} files, {made.written} of them written now"
    )
