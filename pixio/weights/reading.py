"""Every file, folder or repository a Pixio weight comes in -> one strict state dict.

Read safely (never arbitrary pickles, never a file outside the folder named), memory-mapped, and strictly:
what does not fit exactly is an error that says what was found, what was expected, and what to do.
"""

import argparse
import io
import os
import pickle
import re
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import torch

from pixio.files import check_archive, file_in, parts_of, read_json
from pixio.weights import key_mapping
from pixio.weights.key_mapping import State
from pixio.weights.loading import infer_sizes, some
from pixio.weights.wrappers import split_state

_NAME = re.compile(r"enc(\d+)x(\d+)h(\d+)_dec(\d+)x(\d+)h(\d+)$")
_SUFFIXES = (".safetensors", ".pth", ".pt")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MAX_SHARING = 4  # bytes of tensors per byte of the file: tied weights share their storage
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class _NumpyValue:
    """Stands for a type, number or array of numpy beside the weights, such as a best score."""

    def __init__(self, *arguments: Any):
        self._arguments = arguments
        self._state: Any = ()

    def __setstate__(self, state: Any):
        self._state = state

    def plain(self) -> bool | int | float | str | None:
        """The number or text it stands for; None for what is not loaded."""
        import numpy

        match self._arguments:
            case (_NumpyValue(_arguments=(str(code), *_), _state=(_, str(order), *_)), bytes(data)):
                if re.fullmatch(r"[<>=|]([biuf][1248]|U[1-9]\d{0,3})", order + code):
                    kind = numpy.dtype(order + code)
                    return numpy.frombuffer(data, kind)[0].item() if len(data) == kind.itemsize else None
        return None


_ALLOWED_CLASSES = [  # the arguments in the release's checkpoints; Python 3.13 renamed the module of paths
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),
    *((_NumpyValue, f"numpy.{name}") for name in ("dtype", "ndarray")),
    *(
        (_NumpyValue, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")  # renamed in numpy 2
        for name in ("scalar", "_reconstruct")
    ),
]


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a `.safetensors`, a torch file or one of our checkpoints, without executing anything in it.

    Returns:
        The file's top-level mapping, memory-mapped where possible. Beside tensors and plain containers a
        pickle may hold only `argparse.Namespace`, paths, and numpy's values, for which something else
        stands (see `training_config`). Of a checkpoint only `model` is read whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, another kind of file, or holding objects that are not weights.
    """
    path = Path(path).expanduser()
    if _is_checkpoint(path):
        from pixio.engine.checkpoint import materialize, read_checkpoint  # only who trains needs it

        content = read_checkpoint(path, verify=slice(0))
        return {**content, "model": materialize(content["model"])} if "model" in content else content
    if not path.is_file():
        kind = " (it is a folder)" if path.is_dir() else ""
        raise FileNotFoundError(f"no weight file at {path.absolute()}{kind}")
    _check_kind(path)
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if is_archive := zipfile.is_zipfile(path):
            check_archive(path)
        with torch.serialization.safe_globals(_ALLOWED_CLASSES), _BoundedReader(io.FileIO(path)) as file:
            source = path if is_archive else file
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the pickle names {foreign[1]}" if foreign else "it is not a pickle of plain weights"
        raise ValueError(
            f"{path}: {what}; only tensors and plain containers are loaded, because pickles can run code; "
            "ask its author for a file that holds only the state dict"
        ) from None
    except ImportError:  # of the library for such files
        raise
    except Exception as error:  # a damaged file can fail anywhere inside the readers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a readable weight file, perhaps truncated while "
            f"copying ({reason}); copy or download it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict or a checkpoint")
    _check_size(content, path)
    return content


class _BoundedReader(io.BufferedReader):
    """A file that reserves no more memory for a read than it has bytes left, whatever its lengths claim."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = min(size, max(os.fstat(self.fileno()).st_size - self.tell(), 0))
        return super().read(size)


def _check_size(content: dict[str, Any], path: Path) -> None:
    """Refuse what is much larger in memory than in its file: views of a few numbers, repeated without end."""
    size, needed = path.stat().st_size, 0
    try:
        for part in parts_of(content, size):
            if isinstance(part, torch.Tensor) and part.layout == torch.strided:
                needed += part.numel() * part.element_size()
    except ValueError as error:
        raise ValueError(f"{path} is not a weight file: {error}") from None
    if needed > _MAX_SHARING * size:
        raise ValueError(
            f"{path} is not a weight file: its tensors would take {needed:,} bytes, the file has {size:,}; "
            "save them as contiguous copies"
        )


def _check_kind(path: Path) -> None:
    """Refuse, by its name, what is often found in the place of a weight file."""
    with path.open("rb") as file:
        head = file.read(64)
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    is_torch = not is_safetensors and head.startswith((b"PK", b"\x80"))
    if head.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer in the place of the weights: run `git lfs pull` where it was cloned"
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        kind = (
            "an HTML page, such as a login page or an error in the place of the download: open its address "
            "in a browser, log in if it asks, and download the file itself"
        )
    elif is_safetensors and path.suffix != ".safetensors":
        kind = f"a safetensors file: rename it to {path.stem}.safetensors"
    elif is_torch and path.suffix == ".safetensors":
        kind = f"a file of torch.save: rename it to {path.stem}.pth"
    elif zipfile.is_zipfile(path) and _is_torchscript(path):
        kind = "a TorchScript program: save the state dict of the model it was made from"
    else:
        return
    raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is {kind}")


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # damaged, as its reader will say
        return False


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
        named = parse_name(str(training_config(content).get("model", ""))).get("encoder")
        return split_state(content, source)[0], named and named[2]
    state, _ = split_state(_read_folder(path), source)
    config_file = path / "config.json"
    config = read_json(_inside(path, config_file.name)) if config_file.is_file() else {}
    return state, _check_config(config, state, config_file) if "model_type" in config else None


def training_config(content: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a training checkpoint's content, ours or the release's; empty if there is none."""
    config = content.get("config", content.get("args", {}))
    config = vars(config) if isinstance(config, argparse.Namespace) else config
    if not isinstance(config, dict):
        return {}
    return {
        name: value.plain() if isinstance(value, _NumpyValue) else value for name, value in config.items()
    }


def parse_name(name: str) -> dict[str, tuple[int, int, int]]:
    """(width, blocks, heads) of `encoder` and `decoder` in a pre-training name; empty for other texts."""
    found = _NAME.search(name)
    if not found:
        return {}
    a, b, c, d, e, f = map(int, found.groups())
    return {"encoder": (a, b, c), "decoder": (d, e, f)}


def _download(repository: str) -> Path:
    """The local copy of a Hugging Face repository; `.pth` files only where there is nothing safer."""
    nothing = f"there is no file or folder {Path(repository).absolute()}"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ImportError(
            f"{nothing}; to fetch the repository of this name from the Hugging "
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
            f"{repository} is gated: request access at {page} while logged in; once it is granted, log in "
            "here with `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{nothing}, and no repository {page} that you have access to; if it is "
            "private, log in with `hf auth login`"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise FileNotFoundError(
            f"{nothing}, the repository {repository} is not in the cache, and "
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
                raise ValueError(f"{folder / name} and {index} disagree on {some(odd)}; download both again")
        return {key: value for shard in shards.values() for key, value in shard.items()}
    found = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
    if _SINGLE not in found and len(found) != 1:
        raise FileNotFoundError(
            f"{folder.absolute()} holds {some(found) or 'no weight file'}; expected {_SINGLE}, {_INDEX} with "
            f"its shards, or one file ending in {', '.join(_SUFFIXES)}: name the file"
        )
    return read_file(_inside(folder, _SINGLE if _SINGLE in found else found[0]))


def _inside(folder: Path, name: str, suffix: str = "") -> Path:
    """The file `name` of `folder`; see `file_in`."""
    if Path(name).name != name or not name.endswith(suffix):
        raise ValueError(f"{folder}: '{name}' is not the plain name of a {suffix or 'file'} in this folder")
    return file_in(folder, name)


def _check_config(config: dict[str, Any], state: State, path: Path) -> int | None:
    """The heads that a configuration of transformers names, after comparing the rest with the tensors."""
    try:
        sizes = infer_sizes(state, path.parent)
    except ValueError:
        if not isinstance(size := config.get("image_size"), list):
            raise
        sizes = infer_sizes(state, path.parent, size)  # the grid is not square
    for key, expected in key_mapping.transformers_config(sizes).items():
        expected = list(expected) if isinstance(expected, tuple) else expected
        if key in config and config[key] not in (expected, [expected, expected]):
            raise ValueError(
                f"{path}: {key} is {config[key]!r:.80}, expected {expected!r} for the tensors beside it"
            )
    heads, width = config.get("num_attention_heads"), sizes["embed_dim"]
    if heads is not None and (type(heads) is not int or not 0 < heads <= width or width % heads):
        raise ValueError(f"{path}: num_attention_heads is {heads!r:.80}, which does not divide the width")
    return heads
