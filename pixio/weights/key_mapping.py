"""Key mappings: a Pixio state dict from those of other libraries, and theirs from it, tensors untouched.

Known: transformers (https://github.com/huggingface/transformers), whose names differ between versions and
between `PixioModel` and `PixioBackbone`, and timm (https://github.com/huggingface/pytorch-image-models),
whose vision transformer calls all class tokens but the first registers. Shapes: C class tokens, N patches,
D width.
"""

import re
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

_STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_LAYERS = {  # ours: the name in transformers 5.0, which every version reads, then the names of later versions
    "norm1": ("norm1", "layernorm_before"),
    "norm2": ("norm2", "layernorm_after"),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp.fc2": ("mlp.fc2", "output.dense"),
}
_OURS = {theirs: ours for ours, names in _LAYERS.items() for theirs in names}
_BACKBONE = re.compile(r"(pixio|encoder)\.(?=embeddings\.|layernorm\.|encoder\.|layers\.)")
_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def is_transformers(state: State) -> bool:
    """Whether the keys are those of transformers' `PixioModel` or `PixioBackbone`, of any version."""
    return any(key.endswith("embeddings.position_embeddings") for key in state)


def from_transformers(state: State) -> State:
    """Rename keys of transformers to ours and fuse queries, keys and values; foreign keys stay as they are.

    A later `PixioBackbone` holds two final norms; the outer one makes its feature maps and is taken.

    Raises:
        ValueError: two tensors for one place.
    """
    ours: State = {}
    for key, value in state.items():
        inner = _BACKBONE.sub("", key, count=1) if _BACKBONE.match(key) else key
        if inner != key and inner.startswith("layernorm.") and inner in state:
            continue
        name = _STEM.get(inner, key)
        if (layer := _LAYER.fullmatch(inner)) and layer[2] in _OURS:
            name = f"blocks.{layer[1]}.{_OURS[layer[2]]}.{layer[3]}"
        if name in ours:
            raise ValueError(f"{key} and another key both hold {name}: the file mixes two namings")
        ours[name] = value
    for query in [name for name in ours if ".attn.q." in name]:
        names = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        parts = [ours[name] for name in names if name in ours]
        if len(parts) == 3 and all(part.shape == parts[0].shape and part.ndim for part in parts):
            ours[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)  # [3 * D, D] or [3 * D]
            for name in names:
                del ours[name]
    return ours


def to_transformers(state: State) -> State:
    """Our keys renamed to those every transformers >= 5.0 reads, for `PixioModel` and `PixioBackbone` alike.

    The final norm is written a second time, as `pixio.layernorm`: a later `PixioBackbone` has two, and leaves
    the one it does not find at its initial value. (Checked with 5.0, 5.8, 5.12 and 5.23.)
    """
    stem = {ours: theirs for theirs, ours in _STEM.items()}
    theirs: State = {}
    for key, value in state.items():
        if block := _BLOCK.fullmatch(key):
            prefix, leaf = f"encoder.layer.{block[1]}", block[3]
            if block[2] == "attn.qkv":
                for part, tensor in zip("qkv", value.chunk(3), strict=True):  # [D, D] or [D] each
                    theirs[f"{prefix}.{_LAYERS[f'attn.{part}'][0]}.{leaf}"] = tensor
            else:
                theirs[f"{prefix}.{_LAYERS[block[2]][0]}.{leaf}"] = value
        else:
            theirs[stem[key]] = value
    # A copy, not a second name: safetensors writes no tensor twice.
    return theirs | {f"pixio.layernorm.{leaf}": state[f"norm.{leaf}"].clone() for leaf in ("weight", "bias")}


def transformers_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """The fields of transformers' `PixioConfig`, but for the heads; sizes as from `infer_sizes`."""
    return {
        "model_type": "pixio",
        "hidden_size": sizes["embed_dim"],
        "num_hidden_layers": sizes["depth"],
        "mlp_ratio": sizes["mlp_ratio"],
        "image_size": sizes["img_size"],
        "patch_size": sizes["patch_size"],
        "num_channels": sizes["in_chans"],
        "n_cls_tokens": sizes["n_cls_tokens"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    }


def is_timm(state: State) -> bool:
    """Whether the keys are those of a timm vision transformer with registers."""
    return "reg_token" in state


def from_timm(state: State) -> State:
    """Join class token and registers to C class tokens.

    Positions for all tokens are kept as they are. Where the file has none for the class tokens (timm's
    `no_embed_class`, or tokens to which they were added before), theirs become zero: the same function.
    """
    ours = {key: value for key, value in state.items() if key != "reg_token"}
    parts = [ours.get("cls_token"), state["reg_token"], ours.get("pos_embed")]
    if any(part is None or part.ndim != 3 for part in parts) or len({part.shape[::2] for part in parts}) != 1:
        return state
    cls_token, registers, positions = parts
    ours["cls_token"] = torch.cat([cls_token, registers], dim=1)  # [1, C, D]
    n_cls_tokens, n_positions = ours["cls_token"].shape[1], positions.shape[1]
    if not _is_square(n_positions - n_cls_tokens) and _is_square(n_positions):
        missing = positions.new_zeros(1, n_cls_tokens, positions.shape[2])
        ours["pos_embed"] = torch.cat([missing, positions], dim=1)  # [1, C + N, D]
    return ours


def to_timm(state: State) -> State:
    """The first class token becomes timm's class token, the others its registers; positions stay as they are.

    Fits a `VisionTransformer` with `reg_tokens` = C - 1 and timm's default `no_embed_class=False`.
    """
    theirs = dict(state)
    theirs["cls_token"], registers = state["cls_token"].tensor_split([1], dim=1)  # [1, 1, D], [1, C - 1, D]
    return theirs | {"reg_token": registers} if registers.shape[1] else theirs


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number
