"""The table of models: every encoder, and every encoder with the decoder it is pre-trained with.

Released sizes carry published weights; `femto`, `pico`, `ti` and `s` are ours, for laptops and single GPUs,
and carry none. A pre-training name holds both halves:
`enc<width>x<blocks>h<heads>_dec<width>x<blocks>h<heads>`. The published recipes use the 512-wide, 32-block
decoder; at equal batch it costs 7 % of the FLOPs beside the 5B encoder but 80 % beside B, so small encoders
get a lighter one here.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pixio.models.encoder import PixioViT
from pixio.models.mae import PixioMAE
from pixio.weights import reading as weights

_ENCODERS: dict[str, Callable[..., PixioViT]] = {}
_MAES: dict[str, Callable[..., PixioMAE]] = {}
_HEADS: dict[tuple[int, int], int] = {}  # (width, blocks) -> heads
_MAE_OPTIONS = ("mask_grid", "norm_pix_loss")


def _encoder(name: str, width: int, blocks: int, heads: int) -> Callable[..., PixioViT]:
    def build(pretrained: str | Path | None = None, **options: Any) -> PixioViT:
        options = {"embed_dim": width, "depth": blocks, "num_heads": heads} | options
        if pretrained is None:
            return PixioViT(**options)
        with torch.device("meta"):
            model = PixioViT(**options)
        weights.load_encoder(model, pretrained)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Encoder of width {width}, {blocks} blocks, {heads} heads.

    Args:
        pretrained: weight file (a released `.pth`, a training checkpoint, a `.safetensors`), a folder of
            transformers, or the id of a Hugging Face repository such as `facebook/pixio-vith16`; see
            `pixio.weights.reading.read_encoder`. None = random.
        **options: any argument of `PixioViT`.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that does not hold exactly this model.
    """
    _ENCODERS[name] = build
    _HEADS[width, blocks] = heads
    return build


def _mae(name: str, encoder: Callable[..., PixioViT]) -> Callable[..., PixioMAE]:
    width, blocks, heads = weights.parse_heads(name)["decoder"]

    def build(pretrained: str | Path | None = None, **options: Any) -> PixioMAE:
        decoder = {"decoder_embed_dim": width, "decoder_depth": blocks, "decoder_num_heads": heads}
        decoder |= {key: options.pop(key) for key in _MAE_OPTIONS if key in options}
        return PixioMAE(encoder(pretrained, **options), **decoder)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""`{encoder.__name__}` with a decoder of width {width}, {blocks} blocks, {heads} heads.

    Args:
        pretrained: weight file for the encoder alone; the decoder always starts fresh (`load_mae` loads
        both). **options: any argument of `PixioViT`, and `mask_grid`, `norm_pix_loss` of `PixioMAE`.
    """
    _MAES[name] = build
    return build


pixio_vitfemto16 = _encoder("pixio_vitfemto16", 64, 4, 2)
pixio_vitpico16 = _encoder("pixio_vitpico16", 128, 6, 4)
pixio_vitti16 = _encoder("pixio_vitti16", 192, 12, 3)
pixio_vits16 = _encoder("pixio_vits16", 384, 12, 6)
pixio_vitb16 = _encoder("pixio_vitb16", 768, 12, 12)
pixio_vitl16 = _encoder("pixio_vitl16", 1024, 24, 16)
pixio_vith16 = _encoder("pixio_vith16", 1280, 32, 16)
pixio_vit1b16 = _encoder("pixio_vit1b16", 1536, 48, 24)
pixio_vit5b16 = _encoder("pixio_vit5b16", 3072, 48, 32)

pixio_vitfemto16_enc64x4h2_dec64x1h2 = _mae("pixio_vitfemto16_enc64x4h2_dec64x1h2", pixio_vitfemto16)
pixio_vitpico16_enc128x6h4_dec128x2h4 = _mae("pixio_vitpico16_enc128x6h4_dec128x2h4", pixio_vitpico16)
pixio_vitti16_enc192x12h3_dec128x4h4 = _mae("pixio_vitti16_enc192x12h3_dec128x4h4", pixio_vitti16)
pixio_vits16_enc384x12h6_dec256x4h8 = _mae("pixio_vits16_enc384x12h6_dec256x4h8", pixio_vits16)
pixio_vitb16_enc768x12h12_dec512x8h16 = _mae("pixio_vitb16_enc768x12h12_dec512x8h16", pixio_vitb16)
pixio_vitl16_enc1024x24h16_dec512x16h16 = _mae("pixio_vitl16_enc1024x24h16_dec512x16h16", pixio_vitl16)
pixio_vith16_enc1280x32h16_dec512x32h16 = _mae("pixio_vith16_enc1280x32h16_dec512x32h16", pixio_vith16)
pixio_vit1b16_enc1536x48h24_dec512x32h16 = _mae("pixio_vit1b16_enc1536x48h24_dec512x32h16", pixio_vit1b16)
pixio_vit5b16_enc3072x48h32_dec512x32h16 = _mae("pixio_vit5b16_enc3072x48h32_dec512x32h16", pixio_vit5b16)


def list_models(pretraining: bool = False) -> list[str]:
    """Names of all encoders, small to large, or of all pre-training models (encoder with decoder)."""
    return list(_MAES if pretraining else _ENCODERS)


def create_model(name: str, pretrained: str | Path | None = None, **options: Any) -> PixioViT | PixioMAE:
    """Build an encoder or a pre-training model by its name in `list_models`.

    Raises:
        ValueError: unknown name; the message lists the choices.
    """
    builders = _ENCODERS | _MAES
    if name not in builders:
        close = difflib.get_close_matches(name, builders, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown model '{name}': {hint}choose one of {', '.join(builders)}")
    return builders[name](pretrained, **options)


def from_pretrained(source: str | Path, num_heads: int | None = None, **options: Any) -> PixioViT:
    """Build the encoder that a file, folder or Hugging Face repository holds, and load it.

    Args:
        source: as `pretrained` of the builders.
        num_heads: for sizes that are not in `list_models`, where the source does not name the heads either.
        **options: further arguments of `PixioViT`, such as `drop_path`.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `pixio.weights.reading`; and unknown heads.
    """
    state, sizes = read_model(source, num_heads)
    with torch.device("meta"):
        model = PixioViT(**{**sizes, **options})
    weights.assign(model, state, source)
    return model


def read_model(source: str | Path, num_heads: int | None = None) -> tuple[weights.State, dict[str, Any]]:
    """The state dict of a source and all arguments of `PixioViT` it was made with; see `from_pretrained`."""
    state, named = weights.read_encoder(source)
    sizes = weights.infer_sizes(state, source)
    if num_heads and named and num_heads != named:
        raise ValueError(f"num_heads {num_heads}, but {source} was made with {named} heads")
    heads = num_heads or named or _HEADS.get((sizes["embed_dim"], sizes["depth"]))
    if heads is None:
        raise ValueError(
            f"{source}: width {sizes['embed_dim']} with {sizes['depth']} blocks is none of the known models, "
            "and heads cannot be read off tensors: pass num_heads"
        )
    return state, {**sizes, "num_heads": heads}
