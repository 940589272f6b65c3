"""What several commands share: choices, files to write, and where an encoder comes from."""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pixio.images.inference import FITS, Transform
from pixio.models.encoder import PixioViT

PICTURES = (".png", ".pdf", ".svg")


class Choices:
    """The keys of a table of another module, which is imported when they are looked at."""

    def __init__(self, module: str, table: str):
        self.module, self.table = module, table

    def __iter__(self) -> Iterator[Any]:
        return iter(getattr(importlib.import_module(self.module), self.table))


def new_file(*suffixes: str) -> Callable[[str], Path]:
    """The argparse type of a file to write, so that mistakes are found before the work is done."""

    def check(text: str) -> Path:
        path = Path(text)
        if path.suffix not in suffixes:
            raise argparse.ArgumentTypeError(f"{text} must end in {' or '.join(suffixes)}")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"no folder {path.parent} to write {path.name} to")
        return path

    return check


def positive(text: str) -> int:
    """The argparse type of a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """Flags of `load_encoder`, and the device."""
    parser.add_argument(
        "--pretrained", help="weight file, training checkpoint, folder, or Hugging Face repository"
    )
    parser.add_argument("--model", help="encoder name, see `pixio info`; needed only without --pretrained")
    parser.add_argument("--num_heads", type=int, help="of --pretrained, where it does not tell")
    parser.add_argument("--device", default="auto", help="auto (a GPU if any), cpu, or a torch device")


def load_encoder(model: str | None, pretrained: str | None, num_heads: int | None) -> PixioViT:
    """The encoder that was asked for, in evaluation mode; random weights are always the same ones.

    Raises:
        ValueError, FileNotFoundError, ImportError: nothing was asked for; see `pixio.from_pretrained`.
    """
    import torch

    import pixio

    if pretrained and not model:
        return pixio.from_pretrained(pretrained, num_heads).eval()
    if not model:
        raise ValueError("name weights with --pretrained, or a --model to try out with random ones")
    if model not in pixio.list_models():
        raise ValueError(f"--model {model} is no encoder: choose from {', '.join(pixio.list_models())}")
    if not pretrained:
        torch.manual_seed(0)
        print("random weights: give --pretrained for real features", file=sys.stderr)
    from pixio.models import external as adaptors  # it reads the input size and the class tokens off the file

    return adaptors.load_encoder(model, pretrained, **({"num_heads": num_heads} if num_heads else {}))


def add_input(parser: argparse.ArgumentParser, fit: str) -> None:
    """Flags of `make_transform`."""
    parser.add_argument(
        "--size",
        type=positive,
        help="pixels of the encoder's input, see --fit; its native size when left out",
    )
    parser.add_argument(
        "--fit",
        default=fit,
        choices=FITS,
        help="square: size x size, whatever the aspect ratio; resize: longer side = size, then both to the "
        "nearest multiple of the patch size; pad: longer side = size, then padded to multiples",
    )


def make_transform(encoder: PixioViT, size: int | None, fit: str) -> Transform:
    """How images become the input of an encoder."""
    return Transform(size or max(encoder.img_size), fit, encoder.patch_size)
