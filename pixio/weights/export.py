"""Weights out: a Pixio encoder as a file or folder that other libraries read.

Between weight files the tensors are only renamed, cut and joined, in the precision of the source, so that
converting back gives every bit. Letters: B images, H x W pixels, N patches, C class tokens, D width.
"""

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixio.files import temporary_path, write_atomic, write_json
from pixio.images.normalization import IMAGENET_MEAN, IMAGENET_STD
from pixio.weights import key_mapping
from pixio.weights.key_mapping import State
from pixio.weights.loading import sizes_of

FORMATS = ("pth", "safetensors", "transformers", "timm", "onnx")
ONNX_OUTPUTS = ("patch_tokens", "cls_tokens", "patch_tokens_norm", "cls_tokens_norm")
_ONNX_INLINE = 2**30  # bytes of weights kept in the file itself; the format ends at 2 GiB
_TIMM_FILES = (".pth", ".pt", ".bin", ".safetensors")
_TIMM_MODEL = "vit_base_patch16_224"  # the entry whose sizes our arguments replace
_BICUBIC = 3  # of PIL.Image.Resampling


def export(
    model: nn.Module,
    target: str | Path,
    to: str,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    cls: str = "all",
) -> str:
    """Write an encoder for another library, in the precision its weights have.

    Args:
        model: a `PixioViT`; `pixio.from_pretrained(source, dtype=None)` keeps the precision of its source.
        target: file or folder to make; its parent exists, itself it does not.
        to: `pth` (the released keys), `safetensors` (likewise), `transformers` (a folder for `AutoModel`,
            `AutoBackbone` and `AutoImageProcessor` of every version with Pixio), `timm` (a
            `VisionTransformer` with registers: a file if the target ends in .pth or .safetensors, else a
            folder with its configuration) or `onnx` (float32).
        batch: images per batch of an `onnx` model; None = any number.
        size: (height, width) in pixels of its images; None = any multiples of the patch size.
        cls: `all` class tokens, or `mean`: one in their place, for code that expects a single one.

    Returns:
        A line of Python that loads the result, and below it comments on what differs from Pixio's own.

    Raises:
        ValueError: an unknown format, or one that cannot hold this model.
        FileExistsError, FileNotFoundError: the target exists, or its parent does not.
        ImportError: a library that the format needs is missing.
    """
    check_target(target, to)
    target = Path(target)
    if to != "onnx" and (batch or size):
        raise ValueError(f"batch and size belong to onnx; a {to} model takes any")
    remarks = []
    if cls == "mean" and model.n_cls_tokens > 1:
        remarks.append(
            f"one class token, the mean of {model.n_cls_tokens}: the others are lost, and with them a part "
            "of what patches attend to, so that all features differ somewhat; measure before use"
        )
        model = with_mean_class_token(model)
    if to == "onnx":
        write_onnx(model.float(), target, batch, size)
        return _lines(f"onnxruntime.InferenceSession({str(target)!r})", remarks)
    state, sizes = model.state_dict(), {**sizes_of(model), "num_heads": model.num_heads}
    with temporary_path(target, sum(value.nbytes for value in state.values())) as path:
        if to == "transformers":
            _write_transformers(state, sizes, path)
            line = f"transformers.AutoModel.from_pretrained({str(target)!r})"
            remarks += _transformers_remarks(model)
        elif to == "timm":
            line = _write_timm(state, sizes, path, target)
            remarks += _timm_remarks(model)
        else:
            _write_tensors(state, path)
            size = sizes["img_size"]
            told = "" if isinstance(size, int) else f", img_size={size}"
            line = f"pixio.from_pretrained({str(target)!r}{told})"
    return _lines(line, remarks)


def _lines(line: str, remarks: list[str]) -> str:
    return "\n".join([line, *(f"# {remark}" for remark in remarks)])


def with_mean_class_token(model: nn.Module) -> nn.Module:
    """A copy of a `PixioViT` whose only class token, with its position, is the mean of all."""
    model = copy.deepcopy(model)
    count = model.n_cls_tokens
    with torch.no_grad():
        tokens, positions = model.pos_embed[:, :count], model.pos_embed[:, count:]  # [1, C, D], [1, N, D]
        model.cls_token = nn.Parameter(model.cls_token.mean(1, keepdim=True))  # [1, 1, D]
        model.pos_embed = nn.Parameter(torch.cat([tokens.mean(1, keepdim=True), positions], dim=1))
    model.n_cls_tokens = 1
    return model


def timm_arguments(sizes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a timm `VisionTransformer` that an encoder of these sizes loads into.

    Args:
        sizes: all arguments of `PixioViT`.
    """
    registers = {"reg_tokens": sizes["n_cls_tokens"] - 1}
    return registers | {key: value for key, value in sizes.items() if key != "n_cls_tokens"}


def _timm_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """What timm's `resolve_model_data_config` and its loader are told of an encoder."""
    side = sizes["img_size"]
    height, width = (side, side) if isinstance(side, int) else side
    return {
        "input_size": (sizes["in_chans"], height, width),
        "fixed_input_size": True,
        "mean": tuple(IMAGENET_MEAN),
        "std": tuple(IMAGENET_STD),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "num_classes": 0,
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }


def _write_timm(state: State, sizes: dict[str, Any], path: Path, target: Path) -> str:
    """Write a file or a folder for timm; returns the line that loads it."""
    arguments, config = timm_arguments(sizes), _timm_config(sizes)
    if target.suffix in _TIMM_FILES:
        _write_tensors(key_mapping.to_timm(state), path)
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        overlay = config | {"file": str(target), "custom_load": False}
        return (
            f"timm.create_model({_TIMM_MODEL!r}, pretrained=True, num_classes=0, {given}, "
            f"pretrained_cfg_overlay={overlay!r})"
        )
    path.mkdir()
    _write_tensors(key_mapping.to_timm(state), path / "model.safetensors")
    content = {"architecture": _TIMM_MODEL, "num_classes": 0, "num_features": sizes["embed_dim"]}
    write_json(path / "config.json", content | {"pretrained_cfg": config, "model_args": arguments})
    return f"timm.create_model('local-dir:{target}', pretrained=True)"


def _timm_remarks(model: nn.Module) -> list[str]:
    remarks = [
        "at another img_size timm resizes positions with another kernel: features differ by some 0.1 %"
    ]
    if model.n_cls_tokens > 1:
        remarks.append(
            f"timm pools the first of the {model.n_cls_tokens} class tokens; the recommended embedding is "
            f"their mean: model.forward_features(images)[:, :{model.n_cls_tokens}].mean(1)"
        )
    return remarks


def _transformers_remarks(model: nn.Module) -> list[str]:
    height, width = model.img_size
    tokens = model.n_cls_tokens + height * width // model.patch_size**2
    states = (len(model.blocks) + 1) * tokens * model.embed_dim * 4 / 2**20
    return [
        f"outputs.hidden_states is filled: {states:.3g} MiB per image of {height}x{width} in float32; "
        "output_hidden_states=False in the call or in from_pretrained switches it off",
        f"transformers before 5.9 takes images of {height}x{width} only",
    ]


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
    patch, side = model.patch_size, model.img_size
    example = size or (side[0] + patch, side[1] + 2 * patch)
    model.grid_of(*example)
    facts = {
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "size": size or side,
        "patch_size": patch,
        "n_cls_tokens": model.n_cls_tokens,
    }
    images = torch.zeros(batch or 2, model.in_chans, *example)
    fixed = (batch is not None, size is not None)
    save_onnx(_LastBlock(model), images, target, ONNX_OUTPUTS, fixed, facts, None if size else patch)


def save_onnx(
    module: nn.Module,
    images: Tensor,
    target: str | Path,
    outputs: Sequence[str],
    fixed: tuple[bool, bool],
    facts: dict[str, Any],
    multiples_of: int | None = None,
) -> None:
    """Write a module as an ONNX model from `images`; weights of more than 1 GiB go to `<target>.data`.

    Args:
        module: takes `images`.
        images: an example, [B, C, H, W].
        target: file to make.
        outputs: names of what the module returns.
        fixed: whether B, and whether H and W, are those of the example; else any.
        facts: kept in the model's metadata, as JSON.
        multiples_of: images of other heights and widths are refused.

    Raises:
        FileExistsError: the target exists.
        ImportError: `onnx` or `onnxscript` is missing.
    """
    dynamic = {} if fixed[0] else {0: "batch"}
    if not fixed[1]:
        dynamic |= {2: "height", 3: "width"}
    weight_bytes = sum(parameter.nbytes for parameter in module.parameters())
    check_target(target, "onnx")
    program = torch.onnx.export(
        module.eval(),
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=outputs,
        dynamic_shapes={"images": dynamic},
    )
    if multiples_of:
        _check_multiples(program.model.graph, multiples_of)
    program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    with temporary_path(Path(target), weight_bytes) as path:
        program.save(path, external_data=weight_bytes > _ONNX_INLINE)


def _check_multiples(graph: Any, patch_size: int) -> None:
    """Make `images` of any size fail where the patch size does not divide it, instead of losing its border.

    ONNX has no assertion: the remainders index a list of one zero, which is added to the images, and the name
    of the node is the message.
    """
    import onnx_ir as ir

    (images,) = graph.inputs
    uses = list(images.uses())
    constants = {"patch": [patch_size], "zero": [0.0], "axes": [0]}
    types = {"patch": torch.int64, "zero": torch.float32, "axes": torch.int64}
    values = {
        name: ir.node("Constant", [], {"value": ir.tensor(torch.tensor(value, dtype=types[name]).numpy())})
        for name, value in constants.items()
    }
    sides = ir.node("Shape", [images], {"start": 2, "end": 4})
    remainders = ir.node("Mod", [sides.outputs[0], values["patch"].outputs[0]])
    name = f"height_and_width_of_images_must_be_multiples_of_{patch_size}"
    zeros = ir.node("Gather", [values["zero"].outputs[0], remainders.outputs[0]], {"axis": 0}, name=name)
    zero = ir.node("ReduceSum", [zeros.outputs[0], values["axes"].outputs[0]], {"keepdims": 0})
    checked = ir.node("Add", [images, zero.outputs[0]])
    graph.insert_before(graph[0], [*values.values(), sides, remainders, zeros, zero, checked])
    for node, index in uses:
        node.replace_input_with(index, checked.outputs[0])


class _LastBlock(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(images)
        return tuple(features[name] for name in ONNX_OUTPUTS)


def _write_tensors(state: State, path: Path) -> None:
    # torch.save would write all of a view's storage, and safetensors refuses views.
    state = {
        key: value
        if value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        else value.clone(memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    if path.suffix == ".safetensors":
        from pixio.engine.tensor_files import write_safetensors  # here, so that light uses stay light

        write_safetensors(state, path, {"format": "pt"})
    else:
        write_atomic(path, lambda file: torch.save(state, file))  # torch does not say why a path fails


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
        "output_hidden_states": True,  # the examples of transformers' documentation read them
    }
    side = sizes["img_size"]
    height, width = (side, side) if isinstance(side, int) else side
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    folder.mkdir()
    _write_tensors(key_mapping.to_transformers(state), folder / "model.safetensors")
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
        raise FileExistsError(f"{target.absolute()} exists: remove it or choose another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent.absolute()} to write {target.name} to")
