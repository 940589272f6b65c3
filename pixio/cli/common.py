"""Options that several commands share: the encoder and how images become its input."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixio.engine.config import option
from pixio.images.inference import Fit, Transform
from pixio.models.encoder import PixioViT

INCOMPLETE = 3  # exit status: done, but for images that cannot be read
FIT = (
    "square: size x size, whatever the aspect ratio; resize: longer side = size, then both to the nearest "
    "multiple of the patch size; pad: longer side = size, then padded to multiples"
)


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Where an encoder comes from, where it runs, and what it is given."""

    pretrained: str | None = option(
        None, "weight file, training checkpoint, folder, or Hugging Face repository"
    )
    model: str | None = option(None, "encoder name, see `pixio info`; needed only without --pretrained")
    num_heads: int | None = option(None, "attention heads of --pretrained, if the file does not say", ge=1)
    device: str = option("auto", "auto (a GPU if any), cpu, or a torch device")
    size: int | None = option(
        None, "input size of the encoder in pixels, see --fit; its native size if omitted", ge=1
    )
    fit: Fit = option("resize", FIT)

    def load_encoder(self) -> PixioViT:
        """The encoder that was asked for, in evaluation mode; random weights are always the same ones.

        Raises:
            ValueError, FileNotFoundError, ImportError: nothing was asked for; see `pixio.from_pretrained`.
        """
        import torch

        import pixio

        if self.pretrained and not self.model:
            return pixio.from_pretrained(self.pretrained, self.num_heads).eval()
        if not self.model:
            raise ValueError("name weights with --pretrained, or a --model to try out with random ones")
        if self.model not in pixio.list_models():
            raise ValueError(
                f"--model {self.model} is not an encoder: choose from {', '.join(pixio.list_models())}"
            )
        if not self.pretrained:
            torch.manual_seed(0)
            print("random weights: give --pretrained for real features", file=sys.stderr)
        from pixio.models.external import load_encoder  # it infers input size and class tokens from the file

        heads = {"num_heads": self.num_heads} if self.num_heads else {}
        return load_encoder(self.model, self.pretrained, **heads)

    def transform(self, encoder: PixioViT) -> Transform:
        """How images become the input of `encoder`."""
        return Transform(self.size or max(encoder.img_size), self.fit, encoder.patch_size)


def check_new_file(path: Path, suffixes: Sequence[str], when: str = "") -> None:
    """Refuse a file that cannot be written, before the work for it is done.

    Args:
        path: value of --output.
        suffixes: those allowed `when`, other options being as they are.

    Raises:
        ValueError: another suffix, or no folder to write to.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"--output {path} must end in {' or '.join(suffixes)} {when}".strip())
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: no folder {path.parent.absolute()} to write {path.name} to")
