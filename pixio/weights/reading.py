"""Every file, folder or repository a Pixio weight comes in -> one strict state dict.

Read safely (never arbitrary pickles, never a file outside the folder named), memory-mapped, and strictly:
what does not fit exactly is an error that says what was found, what was expected, and what to do.
"""

import argparse
import pickle
import re
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor, nn

from pixio.files import read_json
from pixio.models.encoder import PixioViT
from pixio.models.layers import NORM_EPS
from pixio.models.mae import PixioMAE
from pixio.weights import key_mapping
from pixio.weights.key_mapping import State

_WRAPPERS = ("module.", "_orig_mod.")  # left in keys by DistributedDataParallel and torch.compile
_DECODER = re.compile(r"decoder_|mask_token$")
_HEADS = re.compile(r"enc(\d+)x(\d+)h(\d+)_dec(\d+)x(\d+)h(\d+)$")
_SUFFIXES = (".safetensors", ".pth", ".pt")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HARMLESS = [  # the arguments in the release's checkpoints; Python 3.13 renamed the module of paths
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),
]


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a `.safetensors`, a torch file or one of our checkpoints, without executing anything in it.

    Returns:
        The file's top-level mapping, memory-mapped where possible. Beside tensors and plain containers a
        pickle may hold only `argparse.Namespace` and paths. Of a checkpoint only `model` is read whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not a weight file, or holding objects that are not weights.
    """
    path = Path(path).expanduser()
    if _is_checkpoint(path):
        from pixio.engine.checkpoint import materialize, read_checkpoint  # only who trains needs it

        content = read_checkpoint(path, verify=slice(0))
        return {**content, "model": materialize(content["model"])} if "model" in content else content
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


def _is_checkpoint(path: Path) -> bool:
    return (path / "state.pt").is_file()


def _read_safetensors(path: Path) -> State:
    try:  # here, so that torch alone is enough for the rest
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(f"{path}: reading it needs `pip install safetensors`") from None
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def split_state(content: dict[str, Any], source: str | Path) -> tuple[State, State]:
    """Encoder and decoder state dicts, under the released keys, from the content of any known file.

    Known: a released encoder (flat), the release's training checkpoint (flat encoder and decoder under
    `model`), ours (`encoder.*` beside the decoder under `model`), and encoders of transformers and timm, each
    with or without the prefixes of wrapped modules.
    """
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{source} holds no state dict: its top-level keys are {_some(content)}")
    state = {_unwrapped(key): value for key, value in state.items()}
    if key_mapping.is_transformers(state):
        return key_mapping.from_transformers(state), {}
    decoder = {key: value for key, value in state.items() if _DECODER.match(key)}
    encoder = {key.removeprefix("encoder."): state[key] for key in state if key not in decoder}
    return key_mapping.from_timm(encoder) if key_mapping.is_timm(encoder) else encoder, decoder


def _unwrapped(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def read_encoder(source: str | Path) -> tuple[State, int | None]:
    """The encoder of any known source under the released keys, mapped and in the file's precision.

    Args:
        source: a weight file or training checkpoint (`read_file`, `split_state`); a folder with one weight
            file or the shards of an index, and perhaps transformers' `config.json`; or the id of a Hugging
            Face repository with such files (`facebook/pixio-vith16`), which needs `huggingface_hub` and uses
            its cache, token and offline mode.

    Returns:
        The state dict, and the number of heads if the source names it.

    Raises:
        FileNotFoundError, ValueError: nothing there, no access, or content that is not a Pixio encoder.
        ImportError: a library that this kind of source needs is missing.
    """
    path = Path(source).expanduser()
    if not path.exists() and _HUB_ID.fullmatch(str(source)) and path.suffix not in _SUFFIXES:
        path = _download(str(source))
    if not path.is_dir() or _is_checkpoint(path):
        content = read_file(path)
        named = parse_heads(str(_training_config(content).get("model", ""))).get("encoder")
        return split_state(content, source)[0], named and named[2]
    state, _ = split_state(_read_folder(path), source)
    config_file = path / "config.json"
    config = read_json(_inside(path, config_file.name)) if config_file.is_file() else {}
    return state, _check_config(config, state, config_file) if "model_type" in config else None


def _training_config(content: dict[str, Any]) -> dict[str, Any]:
    config = content.get("config", content.get("args", {}))
    config = vars(config) if isinstance(config, argparse.Namespace) else config
    return config if isinstance(config, dict) else {}


def _download(repository: str) -> Path:
    """The local copy of a Hugging Face repository; `.pth` files only where there is nothing safer."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ImportError(
            f"there is no file or folder {repository}; to fetch the repository of this name from the Hugging "
            "Face hub, `pip install huggingface_hub`"
        ) from None
    page = f"https://huggingface.co/{repository}"
    try:
        for patterns in (["config.json", "model*.safetensors", _INDEX], ["*.pth"]):
            folder = Path(snapshot_download(repository, allow_patterns=patterns))
            if any(file.suffix in _SUFFIXES for file in folder.iterdir()):
                return folder
    except errors.GatedRepoError:
        raise ValueError(
            f"{repository} is gated: request access at {page} while logged in, and when it is granted log in "
            "here with `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no file or folder {repository}, and no repository {page} that you may see; if it is "
            "private, log in with `hf auth login`"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise FileNotFoundError(
            f"there is no file or folder {repository}, the repository of this name is not in the cache, and "
            "the hub cannot be reached (no network, or HF_HUB_OFFLINE is set): download it once with "
            f"`hf download {repository}`"
        ) from None
    except errors.HfHubHTTPError as error:
        raise ValueError(f"{page} cannot be downloaded: {str(error).splitlines()[0]}") from None
    raise FileNotFoundError(f"{page}: no {_SINGLE}, {_INDEX} or .pth file there, or none in the cache")


def _read_folder(folder: Path) -> dict[str, Any]:
    """Content of the folder's only weight file, or of all shards that its index lists."""
    if (folder / _INDEX).is_file() and not (folder / _SINGLE).is_file():
        index = _inside(folder, _INDEX)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files")
        shards = {name: read_file(_inside(folder, name, ".safetensors")) for name in {*weight_map.values()}}
        for name, shard in shards.items():
            listed = {key for key, file in weight_map.items() if file == name}
            if odd := listed ^ shard.keys():
                raise ValueError(f"{folder / name} and {index} disagree on {_some(odd)}; download both again")
        return {key: value for shard in shards.values() for key, value in shard.items()}
    found = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
    if _SINGLE not in found and len(found) != 1:
        raise FileNotFoundError(
            f"{folder} holds {_some(found) or 'no weight file'}; expected {_SINGLE}, {_INDEX} with its "
            f"shards, or one file ending in {', '.join(_SUFFIXES)}: name the file"
        )
    return read_file(_inside(folder, _SINGLE if _SINGLE in found else found[0]))


def _inside(folder: Path, name: str, suffix: str = "") -> Path:
    """The file `name` of `folder`; no path and no link may lead out, but into the hub's own cache."""
    path, root = folder / name, folder.resolve()
    if Path(name).name != name or not name.endswith(suffix):
        raise ValueError(f"{folder}: '{name}' is not the plain name of a {suffix or 'file'} in this folder")
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    if path.resolve().parent not in (root, blobs):
        raise ValueError(f"{path} leads out of its folder, to {path.resolve()}; put the file itself there")
    return path


def _check_config(config: dict[str, Any], state: State, path: Path) -> int | None:
    """The heads that transformers' configuration names, after comparing all the rest with the tensors."""
    sizes = infer_sizes(state, path.parent)
    size = sizes["img_size"]
    known = {
        "model_type": ("pixio",),
        "hidden_size": (sizes["embed_dim"],),
        "num_hidden_layers": (sizes["depth"],),
        "mlp_ratio": (sizes["mlp_ratio"],),
        "image_size": (size, [size, size]),
        "patch_size": (sizes["patch_size"], [sizes["patch_size"]] * 2),
        "num_channels": (sizes["in_chans"],),
        "n_cls_tokens": (sizes["n_cls_tokens"],),
        "hidden_act": ("gelu",),
        "layer_norm_eps": (NORM_EPS,),
        "qkv_bias": (True,),
    }
    for key, values in known.items():
        if key in config and config[key] not in values:
            raise ValueError(
                f"{path}: {key} is {config[key]!r:.80}, expected {values[0]!r} for the tensors beside it"
            )
    heads = config.get("num_attention_heads")
    if heads is not None and (
        type(heads) is not int or not 0 < heads <= sizes["embed_dim"] or sizes["embed_dim"] % heads
    ):
        raise ValueError(f"{path}: num_attention_heads is {heads!r:.80}, which does not divide the width")
    return heads


def load_encoder(model: PixioViT, source: str | Path) -> None:
    """Load any source of `read_encoder` into `model`, which may be on the meta device.

    The weights stay mapped from the file until they are used, so they are never held twice; half-precision
    files are widened to float32.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `read_encoder`; and any missing, unexpected or
        differently shaped tensor, or another number of heads.
    """
    state, heads = read_encoder(source)
    if heads and heads != model.num_heads:
        raise ValueError(f"{source} was made with {heads} heads, the model has {model.num_heads}")
    assign(model, state, source)


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
    config = _training_config(content)
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
    assign(model, {f"encoder.{key}": value for key, value in encoder_state.items()} | decoder_state, path)
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
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"{source} is not a Pixio encoder: its keys are {_some(state)}") from None
    n_patches = n_positions - n_cls_tokens
    side = round(max(n_patches, 0) ** 0.5)
    if side * side != n_patches or min(width, channels, patch_size, hidden, side) < 1:
        raise ValueError(
            f"{source} is not a Pixio encoder: width {width}, {channels} channels, patches of {patch_size} "
            f"pixels, MLP of {hidden}, {n_patches} patch positions (a square grid is expected)"
        )
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


def assign(model: nn.Module, state: State, source: str | Path) -> None:
    """Make `state` the weights of `model` without a copy, after `check_fit`; half precision is widened."""
    check_fit(model, state, source)
    model.load_state_dict({key: value.float() for key, value in state.items()}, strict=True, assign=True)


def check_fit(model: nn.Module, state: State, source: str | Path) -> None:
    """Compare the names, shapes and kinds of the tensors of `state` with those of `model`.

    Raises:
        ValueError: they differ; the message says precisely how.
    """
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
    if odd := [key for key, value in state.items() if not _is_plain(value)]:
        complaints.append(f"not plain floating point: {_some(odd)}")
    if complaints:
        raise ValueError(
            f"{source} does not fit this model: {'; '.join(complaints)}. {_advice(model, state)}"
        )


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided and tensor.device.type == "cpu"


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
