"""Pixio as the image encoder of feed-forward 3D models such as MapAnything
(https://github.com/facebookresearch/map-anything).

The module has the attributes and the call of the encoders of UniCeption
(https://github.com/castacks/UniCeption) and takes and gives objects with the same fields; neither package is
needed. Shapes: B images, H x W pixels, p patch size, C class tokens, D width.

    encoder = PixioEncoder("pixio_vith16", pretrained="pixio_vith16.pth", gradient_checkpointing=True)
    features = encoder(EncoderInput(image=images, data_norm_type=encoder.data_norm_type)).features
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pixio.models.registry import create_model

IMAGENET_NORMS = ("dinov2", "dinov3", "croco", "dune", "roma", "pixio")
"""UniCeption's names for the ImageNet mean and standard deviation; every version knows the first."""


@dataclass
class EncoderInput:
    """image: float [B, 3, H, W], normalized as `data_norm_type` says, H and W multiples of p."""

    data_norm_type: str
    image: Tensor


@dataclass
class EncoderOutput:
    """features: [B, D, H/p, W/p], last block after the final norm. registers: [B, D, C], the class tokens."""

    features: Tensor
    registers: Tensor | None = None


class PixioEncoder(nn.Module):
    """A Pixio encoder behind UniCeption's interface.

    Args:
        name: encoder name in `pixio.list_models()`.
        data_norm_type: what the data pipeline calls its normalization, one of `IMAGENET_NORMS`; inputs must
            carry the same name.
        pretrained: any source of weights of the builders; None = random.
        gradient_checkpointing: recompute the blocks in the backward pass instead of keeping activations.
        **options: further arguments of `PixioViT`, such as `drop_path`.

    Attributes:
        enc_embed_dim: width D. patch_size: p. model: the `PixioViT`.

    Raises:
        ValueError: a normalization with other statistics, or see `pixio.create_model`.
    """

    def __init__(
        self,
        name: str = "pixio_vith16",
        data_norm_type: str = IMAGENET_NORMS[0],
        pretrained: str | Path | None = None,
        gradient_checkpointing: bool = False,
        **options: Any,
    ):
        super().__init__()
        if data_norm_type not in IMAGENET_NORMS:
            raise ValueError(
                f"data_norm_type '{data_norm_type}': Pixio wants the ImageNet statistics, which are called "
                f"{', '.join(IMAGENET_NORMS)}"
            )
        self.name = name
        self.data_norm_type = data_norm_type
        self.gradient_checkpointing = gradient_checkpointing
        self.model = create_model(name, pretrained, **options)
        self.model.grad_checkpointing = gradient_checkpointing
        self.patch_size = self.model.patch_size
        self.enc_embed_dim = self.model.embed_dim

    def forward(self, encoder_input: EncoderInput) -> EncoderOutput:
        """Encode `encoder_input.image`; any object with the fields of `EncoderInput` will do.

        Raises:
            ValueError: images normalized otherwise, or of a wrong shape.
        """
        if encoder_input.data_norm_type != self.data_norm_type:
            raise ValueError(
                f"images are normalized as '{encoder_input.data_norm_type}', the encoder expects "
                f"'{self.data_norm_type}'"
            )
        maps = self.model.get_intermediate_layers(encoder_input.image, reshape=True, return_class_token=True)
        features, cls_tokens = maps[0]
        return EncoderOutput(features, cls_tokens.transpose(1, 2))  # [B, D, H/p, W/p], [B, D, C]
