"""The state dict within what a file holds: out of the mappings and prefixes that training code wraps around
it, and apart from the modules beside the encoder.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from pixio.weights import key_mapping
from pixio.weights.key_mapping import State
from pixio.weights.loading import some

_CONTAINERS = ("model", "state_dict", "model_state", "model_state_dict")
_WRAPPERS = {  # whole parts of keys, in front or inside
    "module",  # DistributedDataParallel, averaged models
    "_orig_mod",  # torch.compile
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_fsdp_wrapped_module",
    "inner",  # activation checkpointing in UniCeption
}
_ANCHOR = re.compile(r"(.*\.)?(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight")
# Keys in flat files that are not the encoder's: MAE's decoder, a student's projector.
_BESIDE = re.compile(r"decoder_|mask_token$|last_proj\.")


def split_state(content: dict[str, Any], source: str | Path) -> tuple[State, State]:
    """Encoder under the released keys, and what stands beside it, from the content of any known file.

    Known: a released encoder (flat), the release's training checkpoints (encoder and decoder, or encoder and
    projector of a student, flat), ours (`encoder.*` beside the decoder), and encoders of transformers, timm
    and UniCeption, each within the containers and prefixes of `find_state`.

    Returns:
        Encoder, and the tensors of other modules, such as a decoder, under their own names.

    Raises:
        ValueError: see `find_state`.
    """
    state, beside = find_state(content, source)
    if key_mapping.is_transformers(state):
        return key_mapping.from_transformers(state), beside
    beside |= {key: value for key, value in state.items() if _BESIDE.match(key)}
    encoder = {key: value for key, value in state.items() if key not in beside}
    return key_mapping.from_timm(encoder) if key_mapping.is_timm(encoder) else encoder, beside


def find_state(content: dict[str, Any], source: str | Path) -> tuple[State, State]:
    """The state dict of the vision transformer in a file's content, free of prefixes, and all other tensors.

    It may stand in a mapping such as `state_dict` or `model_state`; its keys may share a prefix (`backbone.`,
    `student.backbone.`) and hold what DistributedDataParallel, averaged models, torch.compile, activation
    checkpointing and FSDP put into them. Entries that are not tensors are left out.

    Raises:
        ValueError: no state dict or several, or two tensors for one name.
    """
    state = _unwrapped(_contained(content, source), source)
    prefixes = {match[1] or "" for key in state if (match := _ANCHOR.fullmatch(key))}
    if len(prefixes) > 1 and "" not in prefixes:
        raise ValueError(f"{source} holds several encoders, under {some(prefixes)}: save one by itself")
    prefix = "" if len(prefixes) != 1 else prefixes.pop()
    if key_mapping.is_transformers(state):  # a name within its own naming
        prefix = prefix.removesuffix("pixio.").removesuffix("encoder.")
    parent = prefix.removesuffix("encoder.")  # a masked autoencoder's decoder stands beside its encoder
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    beside = {key.removeprefix(parent): state[key] for key in state if not key.startswith(prefix)}
    return inside, beside


def unwrapped_key(key: str) -> str:
    """A key without the parts that wrappers of modules put into it, such as `_orig_mod`."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _contained(content: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The innermost mapping that holds the tensors."""
    mappings = {key: value for key, value in content.items() if _holds_tensors(value)}
    known = [key for key in _CONTAINERS if key in mappings][:1]
    encoders = [key for key, value in mappings.items() if any(map(_ANCHOR.fullmatch, map(str, value)))]
    candidates = known or encoders or list(mappings)
    if len(candidates) > 1:
        raise ValueError(f"{source} holds several state dicts, {some(candidates)}: save one by itself")
    if candidates:
        return _contained(mappings[candidates[0]], source)
    if not _holds_tensors(content):
        raise ValueError(f"{source} holds no state dict: its top-level keys are {some(content)}")
    return content


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    return isinstance(value, dict) and any(
        isinstance(key, str) and (isinstance(item, Tensor) or (depth > 0 and _holds_tensors(item, depth - 1)))
        for key, item in value.items()
    )


def _unwrapped(state: dict[str, Any], source: str | Path) -> State:
    unwrapped: State = {}
    for key, value in state.items():
        name = unwrapped_key(str(key))
        is_counter = name.split(".")[-1] == "n_averaged"  # of an averaged model
        if is_counter or not isinstance(value, Tensor):
            continue
        if name in unwrapped:
            raise ValueError(f"{source}: {key} and another key both stand for {name}; save the weights again")
        unwrapped[name] = value
    return unwrapped
