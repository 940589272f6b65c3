"""Models by name: built, filled from any source of weights, and listed; the table is `builders`."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from pixio.models.encoder import PixioViT
from pixio.models.layers import resize_positions
from pixio.models.mae import PixioMAE
from pixio.weights import loading, reading, wrappers
from pixio.weights.key_mapping import State

_ENCODERS: dict[str, Callable[..., PixioViT]] = {}
_MAES: dict[str, Callable[..., PixioMAE]] = {}
_HEADS: dict[tuple[int, int], int] = {}  # (width, blocks) -> heads
_MAE_OPTIONS = ("mask_grid", "norm_pix_loss")


def encoder_builder(name: str, width: int, blocks: int, heads: int, **sizes: int) -> Callable[..., PixioViT]:
    """Register an encoder, with other `sizes` than the released ones' where given; returns its builder."""

    def build(pretrained: str | Path | None = None, **options: Any) -> PixioViT:
        options = {"embed_dim": width, "depth": blocks, "num_heads": heads} | sizes | options
        if pretrained is None:
            return PixioViT(**options)
        state, named_heads = reading.read_encoder(pretrained)
        with torch.device("meta"):
            model = PixioViT(**options)
        return fill_encoder(model, state, named_heads, pretrained)

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


def mae_builder(name: str, encoder: Callable[..., PixioViT]) -> Callable[..., PixioMAE]:
    """Register an encoder with the decoder that `name` describes; returns the function that builds both."""
    width, blocks, heads = reading.parse_name(name)["decoder"]

    def build(pretrained: str | Path | None = None, **options: Any) -> PixioMAE:
        decoder: dict[str, Any] = {
            "decoder_embed_dim": width,
            "decoder_depth": blocks,
            "decoder_num_heads": heads,
        }
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
        hint = did_you_mean(name, builders)
        raise ValueError(f"unknown model '{name}': {hint}choose one of {', '.join(builders)}")
    return builders[name](pretrained, **options)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the known name nearest to an unknown one, ending in a blank; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""


def from_pretrained(
    source: str | Path,
    num_heads: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> PixioViT:
    """Build the encoder that a file, folder or Hugging Face repository holds, and load it.

    Args:
        source: as `pretrained` of the builders.
        num_heads: for sizes that are not in `list_models`, where the source does not name the heads either.
        dtype: of the weights; None = as stored.
        **options: further arguments of `PixioViT`, such as `drop_path`; `img_size` where it is not square.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `pixio.weights.reading`; and unknown heads.
    """
    state, named_heads = reading.read_encoder(source)
    sizes = loading.infer_sizes(state, source, options.get("img_size"))
    heads = num_heads or named_heads or _HEADS.get((sizes["embed_dim"], sizes["depth"]))
    if heads is None:
        raise ValueError(
            f"{source}: width {sizes['embed_dim']} with {sizes['depth']} blocks matches no known model, "
            "and the number of heads cannot be inferred from tensors: pass num_heads"
        )
    with torch.device("meta"):
        model = PixioViT(**{**sizes, "num_heads": heads, **options})
    return fill_encoder(model, state, named_heads, source, dtype)


def fill_encoder(
    model: PixioViT,
    state: State,
    named_heads: int | None,
    source: str | Path,
    dtype: torch.dtype | None = torch.float32,
) -> PixioViT:
    """Load what `read_encoder` returned into a model of exactly its sizes, which may be on the meta device.

    Raises:
        ValueError: another number of heads, or any missing, unexpected or differently shaped tensor.
    """
    if named_heads and named_heads != model.num_heads:
        raise ValueError(f"{source} was made with {named_heads} heads, the model has {model.num_heads}")
    loading.assign(model, state, source, dtype)
    return model


def load_mae(
    path: str | Path, num_heads: int | None = None, decoder_num_heads: int | None = None, **options: Any
) -> PixioMAE:
    """Rebuild encoder and decoder from a training checkpoint, ours or the release's.

    Sizes are read off the tensors. Numbers of heads leave no trace in them: they come from the model's name
    in the checkpoint's configuration, or from the arguments.

    Args:
        path: training checkpoint.
        num_heads: encoder heads, if the file does not name its model.
        decoder_num_heads: likewise for the decoder.
        **options: further arguments of `PixioViT`, `mask_grid`, `norm_pix_loss`; by default as in the
        checkpoint.

    Raises:
        FileNotFoundError, ValueError: see `from_pretrained`; an encoder-only file; unknown heads.
    """
    encoder_state, decoder_state, config, named = _read_mae(path)
    num_heads = num_heads or named.get("encoder", (0, 0, 0))[2]
    decoder_num_heads = decoder_num_heads or named.get("decoder", (0, 0, 0))[2]
    if not num_heads or not decoder_num_heads:
        raise ValueError(
            f"{path} does not name its model, and heads cannot be inferred from tensors: "
            "pass num_heads and decoder_num_heads (the published decoder has 16)"
        )
    sizes = loading.infer_sizes(encoder_state, path, options.get("img_size"))
    mask_grid = options.pop("mask_grid", config.get("mask_grid", 4))
    norm_pix_loss = options.pop("norm_pix_loss", config.get("norm_pix_loss", True))
    width = decoder_state["decoder_embed.weight"].shape[0]
    blocks = loading.count_blocks(decoder_state, "decoder_blocks")
    with torch.device("meta"):
        encoder = PixioViT(**{**sizes, "num_heads": num_heads, **options})
        model = PixioMAE(encoder, width, blocks, decoder_num_heads, mask_grid, norm_pix_loss)
    state = {f"encoder.{key}": value for key, value in encoder_state.items()} | decoder_state
    loading.assign(model, state, path)
    return model


def initialize_from(model: PixioMAE, source: str | Path, decoder: bool = False) -> str:
    """Load weights into a model that is to be trained, their positions resized to its input size.

    Args:
        model: of any weights, which are replaced; without `decoder` the decoder keeps its own.
        source: as for `from_pretrained`; with `decoder` a training checkpoint, ours or the release's.
        decoder: load the decoder too.

    Returns:
        What was resized, in a sentence; empty where the input sizes agree.

    Raises:
        FileNotFoundError, ValueError: see `load_mae`; or all but the input size must fit and does not.
    """
    named_heads: int | None
    if decoder:
        encoder_state, decoder_state, _, named = _read_mae(source)
        named_heads, decoder_heads = (named.get(part, (0, 0, 0))[2] for part in ("encoder", "decoder"))
        expected = model.decoder_blocks[0].attn.num_heads
        if decoder_heads not in (0, expected):
            raise ValueError(
                f"{source} was made with {decoder_heads} decoder heads, the model has {expected}"
            )
    else:
        (encoder_state, named_heads), decoder_state = reading.read_encoder(source), {}
    sizes, (height, width) = loading.infer_sizes(encoder_state, source), model.encoder.grid
    side = sizes["img_size"] // sizes["patch_size"]
    resized = ""
    if (height, width) != (side, side):
        for state, key in ((encoder_state, "pos_embed"), (decoder_state, "decoder_pos_embed")):
            if key in state:
                n_cls = sizes["n_cls_tokens"]
                state[key] = resize_positions(state[key], n_cls, (side, side), (height, width))
        resized = f"positions of {source} resized from {side} x {side} to {height} x {width} patches"
    fill_encoder(model.encoder, encoder_state, named_heads, source)
    if decoder:
        encoder_state = {f"encoder.{key}": value for key, value in model.encoder.state_dict().items()}
        loading.assign(model, encoder_state | decoder_state, source)
    return resized


def _read_mae(path: str | Path) -> tuple[State, State, dict[str, Any], dict[str, tuple[int, int, int]]]:
    """Encoder, decoder, configuration and, where it names the model, width, blocks and heads of both."""
    content = reading.read_file(path)
    encoder, decoder = wrappers.split_state(content, path)
    if "decoder_embed.weight" not in decoder:
        raise ValueError(f"{path} has no decoder: it is an encoder file; give a training checkpoint")
    config = reading.training_config(content)
    return encoder, decoder, config, reading.parse_name(str(config.get("model", "")))
