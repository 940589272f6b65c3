"""State dicts into modules: the sizes a state dict has, whether it fits a module exactly, filling it."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixio.weights.key_mapping import State

SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "mlp_ratio", "n_cls_tokens")
"""Arguments of `PixioViT` that a state dict shows; the number of heads leaves no trace in tensors."""
_SIZE_KEYS = ("patch_embed.proj.weight", "cls_token", "pos_embed", "blocks.0.mlp.fc1.weight")


def infer_sizes(
    state: State, source: str | Path, img_size: int | Sequence[int] | None = None
) -> dict[str, Any]:
    """Arguments of `PixioViT`, all but the heads, that a state dict was made with.

    Args:
        state: of the encoder.
        source: of the state, for messages.
        img_size: of an encoder whose grid is not square, which tensors do not tell; only if it fits.

    Raises:
        ValueError: a tensor that shows them is missing or has an impossible shape.
    """
    if missing := [key for key in _SIZE_KEYS if key not in state]:
        raise ValueError(
            f"{source} is not a Pixio encoder: {missing_keys(missing, state)}; its keys are {some(state)}"
        )
    projection, cls_token, positions, fc1 = (state[key] for key in _SIZE_KEYS)
    if [projection.ndim, cls_token.ndim, positions.ndim, fc1.ndim] != [4, 3, 3, 2]:
        shapes = ", ".join(f"{key} {list(state[key].shape)}" for key in _SIZE_KEYS)
        raise ValueError(f"{source} is not a Pixio encoder: its shapes are {shapes}")
    width, channels, patch_size, _ = projection.shape
    n_cls_tokens, n_positions, hidden = cls_token.shape[1], positions.shape[1], fc1.shape[0]
    n_patches = n_positions - n_cls_tokens
    side = round(max(n_patches, 0) ** 0.5)
    given = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size or ())
    if not _fits(given, patch_size, n_patches):
        given = (side * patch_size, side * patch_size) if side * side == n_patches else ()
    if not given or min(width, channels, patch_size, hidden, side) < 1:
        raise ValueError(
            f"{source} is not a Pixio encoder: width {width}, {channels} channels, patches of {patch_size} "
            f"pixels, MLP of {hidden}, {n_patches} patch positions (a square grid is expected; for another, "
            "pass img_size=(height, width) in pixels)"
        )
    return {
        "img_size": given[0] if given[0] == given[1] else given,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "depth": count_blocks(state, "blocks"),
        "mlp_ratio": hidden / width,
        "n_cls_tokens": n_cls_tokens,
    }


def _fits(size: tuple[Any, ...], patch_size: int, n_patches: int) -> bool:
    """Whether images of a (height, width) have so many patches; the pair may come from a file."""
    if len(size) != 2 or patch_size < 1 or any(type(side) is not int or side % patch_size for side in size):
        return False
    return min(size) > 0 and (size[0] // patch_size) * (size[1] // patch_size) == n_patches


def count_blocks(state: State, blocks: str) -> int:
    """Number of blocks under a prefix such as `blocks` or `decoder_blocks`."""
    return len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")})


def sizes_of(encoder: nn.Module) -> dict[str, Any]:
    """The same sizes of a `PixioViT`; its native size is one number where it is square."""
    height, width = encoder.img_size
    sizes = {"img_size": height if height == width else (height, width), "depth": len(encoder.blocks)}
    return {key: sizes[key] if key in sizes else getattr(encoder, key) for key in SIZES}


def assign(
    model: nn.Module, state: State, source: str | Path, dtype: torch.dtype | None = torch.float32
) -> None:
    """Make `state` the weights of `model`, which may be on the meta device, after `check_fit`.

    Weights stay memory-mapped from their file until they are used, so that they are never held twice.

    Args:
        dtype: what they are converted to; None = as stored.
    """
    check_fit(model, state, source)
    state = {key: value if dtype is None else value.to(dtype) for key, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)


def check_fit(model: nn.Module, state: State, source: str | Path) -> None:
    """Compare the names, shapes and kinds of the tensors of `state` with those of `model`.

    Raises:
        ValueError: they differ; the message says precisely how.
    """
    expected = model.state_dict()
    differences = []
    unexpected = state.keys() - expected.keys()
    if missing := expected.keys() - state.keys():
        differences.append(missing_keys(missing, unexpected))
    if unexpected:
        differences.append(f"unexpected {some(unexpected)}")
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if shapes:
        differences.append(f"other shapes: {some(shapes)}")
    if odd := [key for key, value in state.items() if not _is_plain(value)]:
        differences.append(f"not plain floating point: {some(odd)}")
    if differences:
        raise ValueError(
            f"{source} does not fit this model: {'; '.join(differences)}. {_advice(model, state)}"
        )


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided and tensor.device.type == "cpu"


def _advice(model: nn.Module, state: State) -> str:
    ours = sizes_of(getattr(model, "encoder", model))
    try:
        found = infer_sizes({key.removeprefix("encoder."): value for key, value in state.items()}, "the file")
    except ValueError as error:
        return str(error)
    different = [
        f"{key} {found[key]} (the model has {ours[key]})" for key in SIZES if found[key] != ours[key]
    ]
    if not different:
        return "Rename these tensors, or save the state dict of the encoder alone."
    advice = f"The file was made with {', '.join(different)}: choose the model and options that match."
    if found["img_size"] != ours["img_size"]:
        advice += " Keep the file's img_size: positions are resized to other inputs at run time."
    return advice


def missing_keys(missing: Iterable[str], present: Iterable[str]) -> str:
    """What is missing and the nearest of the keys that are there instead, for a message."""
    missing, present = sorted(missing), sorted(map(str, present))
    near = {key: difflib.get_close_matches(key, present, n=1, cutoff=0.5) for key in missing[:4]}
    pairs = [f"{key} ~ {found[0]}" for key, found in near.items() if found]
    return f"missing {some(missing)}" + (f" (nearest keys: {', '.join(pairs)})" if pairs else "")


def some(names: Iterable[Any], limit: int = 4) -> str:
    """The first few of some names, sorted, for a message."""
    names = sorted(map(str, names))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
