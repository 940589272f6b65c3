"""Weights out: a Pixio encoder as a file or folder that other libraries read.

Between weight files the tensors are only renamed, cut and joined, in the precision of the source, so that
converting back gives every bit. Letters: B images, H x W pixels, N patches, C class tokens, D width.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixio.files import temporary_path, write_json
from pixio.images.normalization import IMAGENET_MEAN, IMAGENET_STD
from pixio.weights import key_mapping
from pixio.weights.key_mapping import State
from pixio.weights.loading import sizes_of

FORMATS = ("pth", "safetensors", "transformers", "timm", "onnx")
ONNX_OUTPUTS = ("patch_tokens", "cls_tokens", "patch_tokens_norm", "cls_tokens_norm")
_ONNX_INLINE = 2**30  # bytes of weights kept in the file itself; the format ends at 2 GiB
_BICUBIC = 3  # of PIL.Image.Resampling


def export(
    model: nn.Module,
    target: str | Path,
    to: str,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
) -> str:
    """Write an encoder for another library, in the precision its weights have.

    Args:
        model: a `PixioViT`; `pixio.from_pretrained(source, dtype=None)` keeps the precision of its source.
        target: file or folder to make; its parent exists, itself it does not.
        to: `pth` (the released keys), `safetensors` (likewise), `transformers` (a folder for `AutoModel`,
            `AutoBackbone` and `AutoImageProcessor` of every version with Pixio), `timm` (for a
            `VisionTransformer` with registers; as safetensors if the target ends so) or `onnx` (float32).
        batch: images per batch of an `onnx` model; None = any number.
        size: (height, width) in pixels of its images; None = any multiples of the patch size.

    Returns:
        A line of Python that loads the result.

    Raises:
        ValueError: an unknown format, or one that cannot hold this model.
        FileExistsError, FileNotFoundError: the target exists, or its parent does not.
        ImportError: a library that the format needs is missing.
    """
    check_target(target, to)
    target = Path(target)
    if to != "onnx" and (batch or size):
        raise ValueError(f"batch and size belong to onnx; a {to} model takes any")
    if to == "onnx":
        write_onnx(model.float(), target, batch, size)
        return f"onnxruntime.InferenceSession({str(target)!r})"
    state, sizes = model.state_dict(), {**sizes_of(model), "num_heads": model.num_heads}
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
        sizes: all arguments of `PixioViT`.
    """
    return {
        "model_name": "vit_base_patch16_224",
        "num_classes": 0,
        "reg_tokens": sizes["n_cls_tokens"] - 1,
        **{key: value for key, value in sizes.items() if key != "n_cls_tokens"},
    }


def write_onnx(
    model: nn.Module, target: str | Path, batch: int | None = None, size: tuple[int, int] | None = None
) -> None:
    """Write an encoder as an ONNX model from `images` to the four features of the last block.

    Input `images` float32 [B, 3, H, W], normalized; outputs `ONNX_OUTPUTS` as in `PixioViT.forward`. Weights
    of more than 1 GiB go to a second file beside, `<target>.data`.

    Args:
        model: a `PixioViT`, float32.
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
    check_target(target, "onnx")
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
    def __init__(self, model: nn.Module):
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
    if sizes["mlp_ratio"] != int(sizes["mlp_ratio"]):
        raise ValueError(f"transformers' Pixio has integer MLP ratios only, this model {sizes['mlp_ratio']}")
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in state.values()))
    config = {
        **key_mapping.transformers_config(sizes),
        "architectures": ["PixioModel"],
        "dtype": str(dtype).removeprefix("torch."),
        "num_attention_heads": sizes["num_heads"],
        "mlp_ratio": int(sizes["mlp_ratio"]),
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
        write_json(folder / name, content)


def check_target(target: str | Path, to: str) -> None:
    """Raise what `export` says about its format and target."""
    target = Path(target)
    if to not in FORMATS:
        raise ValueError(f"unknown format '{to}': choose one of {', '.join(FORMATS)}")
    if to in ("pth", "safetensors") and (to == "safetensors") != (target.suffix == ".safetensors"):
        raise ValueError(
            f"{target} as {to}: a file's format is inferred from its suffix, name it {target.stem}.{to}"
        )
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it or choose another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} to")
