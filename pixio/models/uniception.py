"""Pixio as the image encoder of feed-forward 3D models such as MapAnything
(https://github.com/facebookresearch/map-anything).

A drop-in for the Pixio encoder in UniCeption's factory (https://github.com/castacks/UniCeption): the same
arguments, attributes, call and weight keys. Its base class and its inputs and outputs are used when it is
installed; without it, the classes here have the same fields. Shapes: B images, H x W pixels, p patch size, C
class tokens, D width.

    encoder = PixioEncoder("my encoder", hf_model_name="pixio_vith16.pth", gradient_checkpointing=True)
    features = encoder(EncoderInput(image=images, data_norm_type=encoder.data_norm_type)).features
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pixio.models.registry import create_model, from_pretrained, list_models
from pixio.weights.wrappers import unwrapped_key

try:
    from uniception.models.encoders.base import UniCeptionViTEncoderBase as _Base
    from uniception.models.encoders.base import ViTEncoderInput as EncoderInput
    from uniception.models.encoders.base import ViTEncoderOutput as EncoderOutput
except ImportError:

    @dataclass
    class EncoderInput:  # type: ignore[no-redef]
        """image: float [B, 3, H, W], normalized as `data_norm_type` says, H and W multiples of p."""

        data_norm_type: str
        image: Tensor

    @dataclass
    class EncoderOutput:  # type: ignore[no-redef]
        """features: [B, D, H/p, W/p], after the final norm. registers: [B, D, C], the class tokens."""

        features: Tensor
        registers: Tensor | None = None

    class _Base(nn.Module):  # type: ignore[no-redef]
        def __init__(self, **attributes: Any):
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value)


IMAGENET_NORMS = ("pixio", "dinov2", "dinov3", "croco", "dune", "roma")
"""UniCeption's names for the ImageNet mean and standard deviation; older versions lack the first."""


class PixioEncoder(_Base):
    """A Pixio encoder behind UniCeption's interface.

    Args:
        name: label of the encoder; a name in `pixio.list_models()` is its architecture too.
        data_norm_type: what the data pipeline calls its normalization, one of `IMAGENET_NORMS`; inputs must
            carry the same name.
        pretrained: any source of weights of `pixio.from_pretrained`.
        gradient_checkpointing: activation checkpointing per block.
        size: label of the size, for UniCeption.
        hf_model_name: UniCeption's name of `pretrained`.
        architecture: a name in `pixio.list_models()`, random where no weights are given. Where neither it
            nor `name` is one, the weights decide: those of `facebook/pixio-vith16` where none are named.
        **options: further arguments of `PixioViT`, such as `img_size` or `drop_path`.

    Attributes:
        enc_embed_dim: width D. patch_size: p. n_cls_tokens: C. model: the `PixioViT`.

    Raises:
        ValueError: a normalization with other statistics, or see `pixio.from_pretrained`.
    """

    def __init__(
        self,
        name: str = "pixio_vith16",
        data_norm_type: str = IMAGENET_NORMS[0],
        pretrained: str | Path | None = None,
        gradient_checkpointing: bool = False,
        size: str | None = None,
        hf_model_name: str | None = None,
        architecture: str | None = None,
        **options: Any,
    ):
        if data_norm_type not in IMAGENET_NORMS:
            raise ValueError(
                f"data_norm_type '{data_norm_type}': Pixio wants the ImageNet statistics, which are called "
                f"{', '.join(IMAGENET_NORMS)}"
            )
        source = pretrained or hf_model_name
        architecture = architecture or (name if name in list_models() else None)
        if architecture:
            model = create_model(architecture, source, **options)
        else:
            model = from_pretrained(source or "facebook/pixio-vith16", **options)
        super().__init__(
            name=name,
            data_norm_type=data_norm_type,
            size=size,
            patch_size=model.patch_size,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.model = model
        self.model.set_grad_checkpointing(gradient_checkpointing)
        self.enc_embed_dim = model.embed_dim
        self.n_cls_tokens = model.n_cls_tokens
        self.register_load_state_dict_pre_hook(_to_our_keys)

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
        # contiguous [B, D, H/p, W/p] and [B, D, C]
        return EncoderOutput(features.contiguous(), cls_tokens.transpose(1, 2).contiguous())


def _to_our_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename UniCeption's keys, `blocks.0.inner.…`, to those of `PixioEncoder.model`, in place."""
    for key in [key for key in state if key.startswith(prefix)]:
        name = unwrapped_key(key.removeprefix(prefix)).removeprefix("model.")
        state[f"{prefix}model.{name}"] = state.pop(key)
