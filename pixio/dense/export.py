"""Encoder and head in one ONNX model: image in, map out. Letters: B images, H x W pixels."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixio.dense.outputs import Classes
from pixio.dense.predictor import Predictor
from pixio.images.normalization import IMAGENET_MEAN, IMAGENET_STD
from pixio.weights.export import save_onnx


def write_onnx(
    predictor: Predictor, target: str | Path, batch: int | None = None, size: tuple[int, int] | None = None
) -> str:
    """Write a predictor as an ONNX model, which predicts in one piece as its mode `whole` does.

    Input `images` uint8 [B, 3, H, W], RGB of any size; output `depth` float32 [B, H, W] in meters, or
    `classes` uint8 [B, H, W]. Range, or names and colors, are in the model's metadata.

    Args:
        predictor: in float32 on the CPU.
        target: file to make.
        batch: B; None = any number.
        size: (H, W) in pixels; None = any.

    Returns:
        A line of Python that loads the result.

    Raises:
        FileExistsError: the target exists.
        ImportError: `onnx` or `onnxscript` is missing.
    """
    output, (window, _) = predictor.output, predictor.window
    name = "classes" if isinstance(output, Classes) else "depth"
    images = torch.zeros(batch or 2, 3, *(size or (window + 1, window + 18)), dtype=torch.uint8)
    facts = {"window": window, "patch_size": predictor.frozen.encoder.patch_size, **vars(output)}
    fixed = (batch is not None, size is not None)
    save_onnx(Whole(predictor), images, target, [name], fixed, facts)
    return f"onnxruntime.InferenceSession({str(target)!r}).run(None, {{'images': pixels}})"


class Whole(nn.Module):
    """A predictor in mode `whole` as a module: what is exported."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.frozen, self.head, self.output = predictor.frozen, predictor.head, predictor.output
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, (torch.tensor(values) * 255)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, H, W]."""
        height, width = images.shape[-2:]
        p = self.frozen.encoder.patch_size
        padded = F.pad((images.float() - self.mean) / self.std, (0, -width % p, 0, -height % p))
        logits = self.head(self.frozen(padded), padded.shape[-2:])[..., :height, :width]  # [B, O, H, W]
        return self.output.decide(self.output.average(logits))
