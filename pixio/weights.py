"""Every file a Pixio weight comes in -> one strict state dict. The only place that knows foreign key names.

Read safely (never arbitrary pickles), memory-mapped, and strictly: what does not fit exactly is an error that
says what was found, what was expected, and what to do.
"""

import argparse
import pickle
import re
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor, nn

from pixio.encoder import PixioViT
from pixio.mae import PixioMAE

State = dict[str, Tensor]
_WRAPPERS = ("module.", "_orig_mod.")  # left in keys by DistributedDataParallel and torch.compile
_DECODER = re.compile(r"decoder_|mask_token$")
_HEADS = re.compile(r"enc(\d+)x(\d+)h(\d+)_dec(\d+)x(\d+)h(\d+)$")
_HARMLESS = [  # the arguments in the release's checkpoints; Python 3.13 renamed the module of paths
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),
]


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a `.safetensors` or a torch file, memory-mapped where possible, without executing anything in it.

    Returns:
        The file's top-level mapping. Beside tensors and plain containers a pickle may hold only
        `argparse.Namespace` and paths.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not a weight file, or holding objects that are not weights.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}" + (" (it is a folder)" if path.is_dir() else ""))
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the pickle names {foreign[1]}" if foreign else "it is not a pickle of plain weights"
        raise ValueError(
            f"{path}: {what}; only tensors and plain containers are loaded, because pickles can run code. "
            "If you trust the file, load it where it was made and save its state dict alone."
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a readable weight file, perhaps cut off while "
            f"copying ({reason}); copy or download it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict or a checkpoint")
    return content


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError, safe_open  # here, so that torch alone is enough for the rest

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def split_state(content: dict[str, Any], source: str | Path) -> tuple[State, State]:
    """Encoder and decoder state dicts, under the released keys, from the content of any known file.

    Known: a released encoder (flat), the release's training checkpoint (flat encoder and decoder under
    `model`), ours (`encoder.*` beside the decoder under `model`), each with or without the prefixes of
    wrapped modules.
    """
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{source} holds no state dict: its top-level keys are {_some(content)}")
    encoder, decoder = {}, {}
    for key, value in state.items():
        while key.startswith(_WRAPPERS):
            key = key.split(".", 1)[1]
        if _DECODER.match(key):
            decoder[key] = value
        else:
            encoder[key.removeprefix("encoder.")] = value
    return encoder, decoder


def load_encoder(model: PixioViT, path: str | Path) -> None:
    """Load an encoder file or the encoder of a training checkpoint into `model`, which may be on the meta
    device.

    The weights stay mapped from the file until they are used, so they are never held twice; half-precision
    files are widened to float32.

    Raises:
        FileNotFoundError, ValueError: see `read_file`; and any missing, unexpected or differently shaped
        tensor.
    """
    state, _ = split_state(read_file(path), path)
    _assign(model, state, path)


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
        FileNotFoundError, ValueError: see `load_encoder`; an encoder-only file; unknown heads.
    """
    content = read_file(path)
    encoder_state, decoder_state = split_state(content, path)
    if "decoder_embed.weight" not in decoder_state:
        raise ValueError(f"{path} has no decoder: it is an encoder file; give a training checkpoint")
    config = content.get("config", content.get("args", {}))
    config = vars(config) if isinstance(config, argparse.Namespace) else config
    named = parse_heads(str(config.get("model", "")))
    num_heads = num_heads or named.get("encoder", (0, 0, 0))[2]
    decoder_num_heads = decoder_num_heads or named.get("decoder", (0, 0, 0))[2]
    if not num_heads or not decoder_num_heads:
        raise ValueError(
            f"{path} does not name its model, and heads cannot be read off tensors: "
            "pass num_heads and decoder_num_heads (the published decoder has 16)"
        )
    sizes = infer_sizes(encoder_state, path)
    mask_grid = options.pop("mask_grid", config.get("mask_grid", 4))
    norm_pix_loss = options.pop("norm_pix_loss", config.get("norm_pix_loss", True))
    width, blocks = decoder_state["decoder_embed.weight"].shape[0], _depth(decoder_state, "decoder_blocks")
    with torch.device("meta"):
        encoder = PixioViT(**{**sizes, "num_heads": num_heads, **options})
        model = PixioMAE(encoder, width, blocks, decoder_num_heads, mask_grid, norm_pix_loss)
    _assign(model, {f"encoder.{key}": value for key, value in encoder_state.items()} | decoder_state, path)
    return model


def parse_heads(name: str) -> dict[str, tuple[int, int, int]]:
    """(width, blocks, heads) of `encoder` and `decoder` in a pre-training name; empty for other texts."""
    found = _HEADS.search(name)
    if not found:
        return {}
    numbers = tuple(map(int, found.groups()))
    return {"encoder": numbers[:3], "decoder": numbers[3:]}


def infer_sizes(state: State, source: str | Path) -> dict[str, Any]:
    """Arguments of `PixioViT`, all but the heads, that a state dict was made with (square grids only)."""
    try:
        width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
        n_cls_tokens, n_positions = state["cls_token"].shape[1], state["pos_embed"].shape[1]
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError):
        raise ValueError(f"{source} is not a Pixio encoder: its keys are {_some(state)}") from None
    side = round((n_positions - n_cls_tokens) ** 0.5)
    if side * side != n_positions - n_cls_tokens:
        raise ValueError(f"{source}: {n_positions - n_cls_tokens} patch positions are no square grid")
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "depth": _depth(state, "blocks"),
        "mlp_ratio": hidden / width,
        "n_cls_tokens": n_cls_tokens,
    }


def _depth(state: State, blocks: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")})


def _assign(model: nn.Module, state: State, source: str | Path) -> None:
    """Make `state` the weights of `model` without a copy, or say precisely how the two differ."""
    expected = model.state_dict()
    complaints = []
    if missing := expected.keys() - state.keys():
        complaints.append(f"missing {_some(missing)}")
    if unexpected := state.keys() - expected.keys():
        complaints.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if shapes:
        complaints.append(f"other shapes: {_some(shapes)}")
    if integers := [key for key, value in state.items() if not value.is_floating_point()]:
        complaints.append(f"not floating point: {_some(integers)}")
    if complaints:
        raise ValueError(
            f"{source} does not fit this model: {'; '.join(complaints)}. {_advice(model, state)}"
        )
    model.load_state_dict({key: value.float() for key, value in state.items()}, strict=True, assign=True)


def _advice(model: nn.Module, state: State) -> str:
    encoder = getattr(model, "encoder", model)
    found = {key.removeprefix("encoder."): value for key, value in state.items()}
    try:
        found = infer_sizes(found, "the file")
    except ValueError as error:
        return str(error)
    ours = {
        "img_size": encoder.img_size[0],
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "mlp_ratio": encoder.mlp_ratio,
        "n_cls_tokens": encoder.n_cls_tokens,
    }
    different = [f"{key} {found[key]} (the model has {ours[key]})" for key in ours if found[key] != ours[key]]
    if not different:
        return "The file was perhaps saved by another version; save the encoder's state dict alone."
    advice = f"The file was made with {', '.join(different)}: choose the model and options that match."
    if found["img_size"] != ours["img_size"]:
        advice += " Keep the file's img_size: positions are resized to other inputs at run time."
    return advice


def _some(names: Any, limit: int = 4) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
