"""Encoders of other libraries behind the features contract of `PixioViT`, for evaluation and as teachers.

`load_encoder` knows `pixio_…` (ours), `timm/NAME` (https://github.com/huggingface/pytorch-image-models) and
`hf/FOLDER` (https://github.com/huggingface/transformers). Every encoder is fed images normalized with the
ImageNet statistics; one that was trained with others converts them inside. Its class tokens are whatever
stands before the patches: the class token(s), then registers; there may be none.

Letters: B images, H x W pixels, N patches, C class (and register) tokens, D width.
"""

import difflib
import hashlib
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixio.files import read_json
from pixio.images.normalization import IMAGENET_MEAN, IMAGENET_STD
from pixio.models import registry
from pixio.models.encoder import PixioViT
from pixio.weights import loading, reading, wrappers

_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
_TIMM_MODULES = ("vision_transformer", "eva", "deit")  # plain vision transformers that take any input size


def load_encoder(name: str, pretrained: str | Path | None = None, **options: Any) -> nn.Module:
    """Build any encoder by name.

    Args:
        name: `pixio_…` as in `pixio.list_models()`; `timm/NAME`, a vision transformer of timm; or
            `hf/FOLDER`, a local folder saved by transformers (Pixio, DINOv2 with or without registers,
            ViT-MAE).
        pretrained: weight file; None leaves pixio and timm encoders random. A folder brings its own.
        **options: for pixio any argument of `PixioViT` (`img_size` and `n_cls_tokens` are read off the
            weight file when not given); for timm any argument of its model, such as `img_size`; for hf none.

    Returns:
        A module in evaluation mode with the attributes `embed_dim`, `patch_size`, `n_cls_tokens`, `blocks`,
        and with `forward(images, block_ids=None)` and `grid_of(height, width)` as in `PixioViT`.

    Raises:
        ValueError: unknown name, not a vision transformer, or weights that do not fit exactly.
        FileNotFoundError: no such weight file or folder.
        ImportError: the library is not installed.
    """
    library, slash, rest = name.partition("/")
    if not slash:
        encoder = _load_pixio(name, pretrained, options)
    elif library == "timm":
        encoder = TimmEncoder(rest, pretrained, **options)
    elif library == "hf":
        if pretrained is not None or options:
            surplus = ", ".join([*options, *([str(pretrained)] if pretrained else [])])
            raise ValueError(f"{name} has its own weights and sizes: omit {surplus}")
        encoder = _load_folder(Path(rest).expanduser())
    else:
        raise ValueError(f"unknown encoder '{name}': expected pixio_…, timm/NAME or hf/FOLDER")
    return encoder.eval()


def depth_of(encoder: nn.Module) -> int:
    """Number of blocks of any encoder of `load_encoder`."""
    return len(encoder.blocks)


def fingerprint(encoder: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all weights, on whatever device they are."""
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _load_pixio(name: str, pretrained: str | Path | None, options: dict[str, Any]) -> PixioViT:
    if name not in (known := registry.list_models()):
        hint = registry.did_you_mean(name, known)
        raise ValueError(
            f"unknown encoder '{name}': {hint}choose one of {', '.join(known)}, timm/NAME or hf/FOLDER"
        )
    if pretrained is None:
        return registry.create_model(name, **options)
    state, named_heads = reading.read_encoder(pretrained)
    sizes = loading.infer_sizes(state, pretrained, options.get("img_size"))
    with torch.device("meta"):
        model = registry.create_model(
            name, **{key: sizes[key] for key in ("img_size", "n_cls_tokens")} | options
        )
    return registry.fill_encoder(model, state, named_heads, pretrained)


class _Adaptor(nn.Module):
    """The contract of `PixioViT` around a model of another library.

    Args:
        model: the other library's model.
        embed_dim, patch_size, n_cls_tokens: D, pixels, C.
        blocks: its transformer blocks.
        norm: its final norm.
        statistics: (mean, standard deviation) per channel, on the scale 0-1, that it was trained with.
    """

    in_chans = 3
    # What the native encoder says about sizes, block ids and output holds here word for word.
    grid_of = PixioViT.grid_of
    resolve_blocks = PixioViT.resolve_blocks
    split_tokens = PixioViT.split_tokens

    def __init__(
        self,
        model: nn.Module,
        embed_dim: int,
        patch_size: int,
        n_cls_tokens: int,
        blocks: nn.ModuleList | nn.Sequential,
        norm: nn.Module,
        statistics: tuple[Sequence[float], Sequence[float]],
    ):
        super().__init__()
        self.model = model
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.n_cls_tokens = n_cls_tokens
        # Held by `model` already: registered a second time they would be stored twice.
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "norm", norm)
        (mean, std), (their_mean, their_std) = torch.tensor(_IMAGENET), torch.tensor(statistics)
        self.register_buffer("scale", (std / their_std)[:, None, None])
        self.register_buffer("shift", ((mean - their_mean) / their_std)[:, None, None])

    def forward(self, images: Tensor, block_ids: Sequence[int] | None = None) -> list[dict[str, Tensor]]:
        """Features after the blocks asked for, as `PixioViT.forward` gives them: tokens [B, N or C, D]."""
        wanted = self.resolve_blocks(block_ids)
        images = images[None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images of shape {list(images.shape)}: expected [B, {self.in_chans}, H, W]")
        self.grid_of(*images.shape[-2:])
        outputs = self._run(images * self.scale + self.shift, set(wanted)) if wanted else {}
        return [self.split_tokens(outputs[i]) for i in wanted]

    def _run(self, images: Tensor, wanted: set[int]) -> dict[int, Tensor]:
        """Tokens [B, C + N, D] as they leave each wanted block; `images` as the model was trained with."""
        raise NotImplementedError("each library has its own way")


# ------------------------------------------------------------------------------------------------------- timm


class TimmEncoder(_Adaptor):
    """A vision transformer of timm, of any patch size, on any input size its patch divides.

    Positions are resized by timm's own rule. Where timm moves the final norm behind the pooling (`fc_norm`),
    that norm is the final one. The classifier is left out.

    Args:
        name: timm's name, with or without a tag; the tag also says which normalization the weights expect.
        pretrained: weight file in timm's keys, or in original keys that timm can convert; None = random.
        **options: arguments of timm's model.
    """

    def __init__(self, name: str, pretrained: str | Path | None = None, **options: Any):
        timm = _require("timm")
        if not timm.models.is_model_in_modules(name, _TIMM_MODULES):
            choices = [choice for module in _TIMM_MODULES for choice in timm.list_models(module=module)]
            near = ", ".join(difflib.get_close_matches(name.split(".")[0], choices, n=3, cutoff=0))
            what = "is not a plain vision transformer" if timm.is_model(name) else "is unknown"
            raise ValueError(
                f"timm/{name} {what}: choose a model of timm's {', '.join(_TIMM_MODULES)}, such as {near}"
            )
        try:
            model = timm.create_model(name, num_classes=0, **{"dynamic_img_size": True, **options})
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"timm/{name} with {options}: {error}") from error
        if pretrained is not None:
            _load_timm(model, pretrained, f"timm/{name}")
        height, width = model.patch_embed.patch_size
        if height != width:
            raise ValueError(f"timm/{name} has patches of {height} x {width} pixels, expected square ones")
        norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
        statistics = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        super().__init__(
            model, model.embed_dim, height, model.num_prefix_tokens, model.blocks, norm, statistics
        )

    def _run(self, images: Tensor, wanted: set[int]) -> dict[int, Tensor]:
        outputs = self.model.forward_intermediates(
            images,
            indices=sorted(wanted),
            return_prefix_tokens=self.n_cls_tokens > 0,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if self.n_cls_tokens:
            outputs = [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]  # [B, C + N, D]
        return dict(zip(sorted(wanted), outputs, strict=True))


def _load_timm(model: nn.Module, path: str | Path, name: str) -> None:
    """Load a weight file strictly, without the classifier's head, which the encoder does not have."""
    convert = importlib.import_module(type(model).__module__).checkpoint_filter_fn
    try:
        state = convert(wrappers.find_state(reading.read_file(path), path)[0], model)
        state = {key: value for key, value in state.items() if not key.startswith(("head.", "head_dist."))}
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, KeyError, TypeError) as error:  # a converter may stumble anywhere
        raise ValueError(f"{path} does not fit {name}: {_shorten(error)}") from error


# ----------------------------------------------------------------------------------------------- transformers


def _load_folder(folder: Path) -> nn.Module:
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no config.json in {folder.absolute()}: give a folder saved by transformers")
    kind = read_json(config).get("model_type")
    if kind == "pixio":
        return registry.from_pretrained(folder)
    if kind not in _TRANSFORMERS:
        raise ValueError(f"hf/{folder} holds a {kind} model: known are pixio, {', '.join(_TRANSFORMERS)}")
    return TransformersEncoder(folder, kind)


def _embed(embeddings: nn.Module, images: Tensor) -> Tensor:
    return embeddings(images)  # [B, C + N, D]


def _embed_mae(embeddings: nn.Module, images: Tensor) -> Tensor:
    """All patches in order: `mask_ratio` is 0, and rising noise makes ViT-MAE's shuffle the identity."""
    p = embeddings.config.patch_size
    n = (images.shape[-2] // p) * (images.shape[-1] // p)
    order = torch.arange(n, device=images.device).expand(len(images), -1)
    return embeddings(images, noise=order, interpolate_pos_encoding=True)[0]  # [B, 1 + N, D]


_TRANSFORMERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "dinov2": _embed,
    "dinov2_with_registers": _embed,
    "vit_mae": _embed_mae,
}
_DROPPED = ("decoder.", "classifier.")  # of the models around the encoder that such folders may hold


class TransformersEncoder(_Adaptor):
    """An encoder from a folder that transformers saved, loaded strictly and without running code from it.

    Args:
        folder: holds `config.json`, the weights, and perhaps `preprocessor_config.json` with the
            normalization (ImageNet's if absent).
        kind: the `model_type` of its configuration.
    """

    def __init__(self, folder: Path, kind: str):
        transformers = _require("transformers")
        changes = {"mask_ratio": 0.0} if kind == "vit_mae" else {}
        try:
            model, report = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **changes
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"hf/{folder} cannot be loaded: {_shorten(error)}") from error
        report["unexpected_keys"] = [k for k in report["unexpected_keys"] if not k.startswith(_DROPPED)]
        if wrong := {what: sorted(map(str, keys)) for what, keys in report.items() if keys}:
            raise ValueError(f"the weights in hf/{folder} do not fit its config.json: {_shorten(wrong)}")
        super().__init__(
            model,
            model.config.hidden_size,
            model.config.patch_size,
            1 + getattr(model.config, "num_register_tokens", 0),
            model.layers if hasattr(model, "layers") else model.encoder.layer,  # differs between versions
            model.layernorm,
            _read_statistics(folder / "preprocessor_config.json"),
        )
        self._embed = _TRANSFORMERS[kind]

    def _run(self, images: Tensor, wanted: set[int]) -> dict[int, Tensor]:
        x = self._embed(self.model.embeddings, images)  # [B, C + N, D]
        outputs = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x  # a tuple in older versions
            if i in wanted:
                outputs[i] = x
        return outputs


def _read_statistics(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that a preprocessor applies."""
    if not path.is_file():
        return _IMAGENET
    content = read_json(path)
    if content.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = content.get("image_mean", IMAGENET_MEAN), content.get("image_std", IMAGENET_STD)
    for value in (mean, std):
        numbers = isinstance(value, list | tuple) and all(isinstance(v, float | int) for v in value)
        if not numbers or len(value) != 3 or not all(map(math.isfinite, value)):
            raise ValueError(f"{path}: image_mean and image_std must be three numbers, found {value!r}")
    if min(std) <= 0:
        raise ValueError(f"{path}: image_std must be positive, found {std!r}")
    return mean, std


def _shorten(message: Any) -> str:
    return " ".join(str(message).split())[:400]


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this encoder needs {package}: pip install {package}") from error
