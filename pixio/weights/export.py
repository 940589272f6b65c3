"""Weights out: a Pixio encoder as a file or folder that other libraries read.

Between weight files the tensors are only renamed, cut and joined, in the precision of the source, so that
converting back gives every bit. Letters: B images, H x W pixels, N patches, C class tokens, D width.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixio.files import temporary_path
from pixio.models.encoder import PixioViT
from pixio.models.layers import NORM_EPS
from pixio.models.registry import read_model
from pixio.weights import key_mapping
from pixio.weights.key_mapping import State
from pixio.weights.reading import assign, check_fit

FORMATS = ("pth", "safetensors", "transformers", "timm", "onnx")
ONNX_OUTPUTS = ("patch_tokens", "cls_tokens", "patch_tokens_norm", "cls_tokens_norm")
_ONNX_INLINE = 2**30  # bytes of weights kept in the file itself; the format ends at 2 GiB
_BICUBIC = 3  # of PIL.Image.Resampling


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    num_heads: int | None = None,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
) -> str:
    """Convert the encoder of any source that `pixio.from_pretrained` takes.

    Args:
        source: file, folder or Hugging Face repository; of a training checkpoint the encoder alone is taken.
        target: file or folder to make; its parent exists, itself it does not.
        to: `pth` (the released layout), `safetensors` (likewise), `transformers` (a folder for `AutoModel`,
            `AutoBackbone` and `AutoImageProcessor` of every version with Pixio), `timm` (for a
            `VisionTransformer` with registers; as safetensors if the target ends so) or `onnx`.
        num_heads: where neither the source nor its size tells; see `pixio.from_pretrained`.
        batch: images per batch of an `onnx` model; None = any number.
        size: (height, width) in pixels of its images; None = any multiples of the patch size.

    Returns:
        A line of Python that loads the result.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `pixio.from_pretrained`; an unknown format.
        FileExistsError: the target exists.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format '{to}': choose one of {', '.join(FORMATS)}")
    if to != "onnx" and (batch or size):
        raise ValueError(f"batch and size belong to onnx; a {to} model takes any")
    source, target = str(source), Path(target)
    if to in ("pth", "safetensors") and (to == "safetensors") != (target.suffix == ".safetensors"):
        raise ValueError(f"{target} as {to}: files are told by their ending, name it {target.stem}.{to}")
    _check_new(target)
    state, sizes = read_model(source, num_heads)
    with torch.device("meta"):
        model = PixioViT(**sizes)
    check_fit(model, state, source)
    if to == "onnx":
        assign(model, state, source)
        write_onnx(model, target, batch, size)
        return f"onnxruntime.InferenceSession({str(target)!r})"
    with temporary_path(target) as path:
        if to == "transformers":
            _write_transformers(state, sizes, path)
            return f"transformers.AutoModel.from_pretrained({str(target)!r})"
        if to == "timm":
            _write_tensors(key_mapping.to_timm(state), path, target.suffix == ".safetensors")
            arguments = ", ".join(f"{key}={value!r}" for key, value in timm_arguments(sizes).items())
            return f"timm.create_model({arguments}, checkpoint_path={str(target)!r})"
        _write_tensors(state, path, to == "safetensors")
        return f"pixio.from_pretrained({str(target)!r})"


def timm_arguments(sizes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `timm.create_model` for a model that an encoder of these sizes loads into.

    Args:
        sizes: all arguments of `PixioViT`, as from `pixio.models.registry.read_model`.
    """
    return {
        "model_name": "vit_base_patch16_224",
        "num_classes": 0,
        "reg_tokens": sizes["n_cls_tokens"] - 1,
        **{key: value for key, value in sizes.items() if key != "n_cls_tokens"},
    }


def write_onnx(
    model: PixioViT, target: str | Path, batch: int | None = None, size: tuple[int, int] | None = None
) -> None:
    """Write an encoder as an ONNX model from `images` to the four features of the last block.

    Input `images` float32 [B, 3, H, W], normalized; outputs `ONNX_OUTPUTS` as in `PixioViT.forward`. Weights
    of more than 1 GiB go to a second file beside, `<target>.data`.

    Args:
        model: float32, in memory.
        target: file to make.
        batch: B; None = any number.
        size: (H, W) in pixels; None = any multiples of the patch size.

    Raises:
        FileExistsError: the target exists.
        ValueError: the patch size does not divide the size.
        ImportError: `onnx` or `onnxscript` is missing.
    """
    dynamic = {} if batch else {0: "batch"}
    if size is None:
        dynamic |= {2: "height", 3: "width"}
        size = (model.img_size[0] + model.patch_size, model.img_size[1] + 2 * model.patch_size)
    model.grid_of(*size)
    images = torch.zeros(batch or 2, model.in_chans, *size)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    _check_new(Path(target))
    with temporary_path(Path(target)) as path:
        torch.onnx.export(
            _LastBlock(model).eval(),
            (images,),
            path,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=ONNX_OUTPUTS,
            dynamic_shapes={"images": dynamic},
            external_data=weight_bytes > _ONNX_INLINE,
        )


class _LastBlock(nn.Module):
    def __init__(self, model: PixioViT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(images)
        return tuple(features[name] for name in ONNX_OUTPUTS)


def _write_tensors(state: State, path: Path, safe: bool) -> None:
    # Views would drag all of their storage into a torch file, and safetensors refuses them.
    state = {
        key: value
        if value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        else value.clone(memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    if safe:
        from pixio.engine.tensor_files import write_safetensors  # here, so that light uses stay light

        write_safetensors(state, path, {"format": "pt"})
    else:
        torch.save(state, path)


def _write_transformers(state: State, sizes: dict[str, Any], folder: Path) -> None:
    from pixio.images.normalization import IMAGENET_MEAN, IMAGENET_STD  # needs more than torch

    if sizes["mlp_ratio"] != int(sizes["mlp_ratio"]):
        raise ValueError(f"transformers' Pixio has whole MLP ratios only, this model {sizes['mlp_ratio']}")
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in state.values()))
    config = {
        "architectures": ["PixioModel"],
        "model_type": "pixio",
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": sizes["embed_dim"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["num_heads"],
        "mlp_ratio": int(sizes["mlp_ratio"]),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": NORM_EPS,
        "image_size": sizes["img_size"],
        "patch_size": sizes["patch_size"],
        "num_channels": sizes["in_chans"],
        "n_cls_tokens": sizes["n_cls_tokens"],
    }
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": sizes["img_size"], "width": sizes["img_size"]},
        "resample": _BICUBIC,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    folder.mkdir()
    _write_tensors(key_mapping.to_transformers(state), folder / "model.safetensors", safe=True)
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _check_new(target: Path) -> None:
    """Raise what `convert` says about its target."""
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it or choose another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} to")
