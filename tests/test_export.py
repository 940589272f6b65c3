"""Weights out and back: transformers, timm, ONNX, torch.export give the native numbers; nothing is lost."""

import functools
import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from helpers import largest_file
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.export import Dim
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, PixioBackbone, PixioModel

import pixio
from pixio import PixioViT
from pixio.weights import key_mapping
from pixio.weights.export import ONNX_OUTPUTS, export, timm_arguments
from pixio.weights.loading import sizes_of

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}


def random_encoder(**options) -> PixioViT:
    """An encoder whose biases and norms are random too, so that nothing is compared at a neutral value."""
    torch.manual_seed(0)
    model = PixioViT(**{**SIZES, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def save(model: PixioViT, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.save({key: value.to(dtype) for key, value in model.state_dict().items()}, path)
    return path


def convert(source, target, to, num_heads=None, **options) -> str:
    return export(pixio.from_pretrained(source, num_heads, dtype=None), target, to, **options)


def assert_same_state(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value, second[key]), key


def assert_close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def model():
    return random_encoder()


@pytest.fixture(scope="module")
def exchanged(model, tmp_path_factory):
    """A folder with the encoder as `encoder.pth` and as the transformers folder `transformers`."""
    folder = tmp_path_factory.mktemp("exchange")
    source = save(model, folder / "encoder.pth")
    convert(source, folder / "transformers", "transformers", num_heads=3)
    return folder


@pytest.fixture(scope="module")
def folder(exchanged):
    return exchanged / "transformers"


@pytest.fixture(scope="module")
def photo():
    y, x = np.mgrid[:90, :120]
    return Image.fromarray(np.stack([2 * x, 2 * y, x + y], axis=-1).astype(np.uint8))


# --- transformers, outwards


@torch.inference_mode()
def test_embedding_an_image_with_transformers_gives_the_native_numbers(model, folder, photo):
    processor = AutoImageProcessor.from_pretrained(folder)
    twin = AutoModel.from_pretrained(folder)
    inputs = processor(images=photo, return_tensors="pt")
    outputs = twin(**inputs, output_hidden_states=True)
    features = model(inputs["pixel_values"])
    assert len(outputs.hidden_states) == len(features) + 1
    for ours, theirs in zip(features, outputs.hidden_states[1:], strict=True):
        assert_close(torch.cat([ours["cls_tokens"], ours["patch_tokens"]], dim=1), theirs)
    assert_close(features[-1]["cls_tokens_norm"].mean(dim=1), outputs.pooler_output)


@torch.inference_mode()
def test_splitting_the_tokens_of_transformers_gives_the_native_ones(model, folder):
    twin = AutoModel.from_pretrained(folder)
    images = torch.randn(2, 3, 96, 64)
    tokens = twin(images).last_hidden_state
    n_cls_tokens, patch = twin.config.n_cls_tokens, twin.config.patch_size
    patches = tokens[:, n_cls_tokens:].unflatten(1, (96 // patch, 64 // patch))  # [B, h, w, D]
    features = model.forward_features(images)
    assert_close(features["cls_tokens_norm"], tokens[:, :n_cls_tokens])
    (maps,) = model.get_intermediate_layers(images, reshape=True)
    assert_close(maps, patches.permute(0, 3, 1, 2))


@torch.inference_mode()
def test_the_compiled_model_of_transformers_gives_the_native_numbers(model, folder):
    twin = torch.compile(AutoModel.from_pretrained(folder), backend="aot_eager")
    images = torch.randn(1, 3, 64, 64)
    features = model.forward_features(images)
    expected = torch.cat([features["cls_tokens_norm"], features["patch_tokens_norm"]], dim=1)
    assert_close(expected, twin(images).last_hidden_state)


@pytest.mark.parametrize("auto_class", [PixioModel, PixioBackbone])
def test_every_weight_of_the_folder_finds_its_place(folder, auto_class):
    _, report = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


def test_auto_backbone_chooses_pixio_for_the_folder(model, folder, monkeypatch):
    # Some versions ask the hub whether the folder is a repository, before they look at it.
    hub = SimpleNamespace(repo_exists=lambda name: True)
    monkeypatch.setattr(transformers.models.auto.auto_factory, "hf_api", lambda: hub, raising=False)
    backbone = AutoBackbone.from_pretrained(folder, out_features=["stage2", "stage4"])
    assert type(backbone) is PixioBackbone
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = backbone(images).feature_maps
        ours = model.get_intermediate_layers(images, n=[1, 3], reshape=True)
    for expected, found in zip(ours, maps, strict=True):
        assert_close(expected, found)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("reshape", [True, False])
@torch.inference_mode()
def test_backbone_options_have_native_equivalents(model, folder, norm, reshape):
    backbone = PixioBackbone.from_pretrained(
        folder, out_features=["stage3", "stage4"], apply_layernorm=norm, reshape_hidden_states=reshape
    )
    images = torch.randn(2, 3, 64, 96)
    ours = model.get_intermediate_layers(images, 2, reshape, norm, return_class_token=True)
    for (patches, cls_tokens), theirs in zip(ours, backbone(images).feature_maps, strict=True):
        assert_close(patches if reshape else torch.cat([cls_tokens, patches], dim=1), theirs)


def test_image_processor_prepares_images_as_we_do(folder, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    ours = pixio.transform(64)(tmp_path / "photo.png")
    theirs = AutoImageProcessor.from_pretrained(folder)(images=photo, return_tensors="pt")["pixel_values"]
    assert (ours - theirs).abs().max() < 2.5 / 255 / 0.224  # both round to whole gray levels


def test_image_processor_of_a_rectangular_encoder_gives_its_size(tmp_path):
    rectangular = PixioViT((32, 64), embed_dim=48, depth=1, num_heads=3).eval()
    export(rectangular, tmp_path / "folder", "transformers")
    stored = json.loads((tmp_path / "folder/preprocessor_config.json").read_text())
    assert stored["size"] == {"height": 32, "width": 64}


def test_a_rectangle_of_a_square_number_of_patches_needs_its_size(tmp_path):
    rectangular = PixioViT((32, 128), embed_dim=48, depth=1, num_heads=3).eval()  # 2 x 8 patches
    export(rectangular, tmp_path / "encoder.safetensors", "safetensors")
    again = pixio.from_pretrained(tmp_path / "encoder.safetensors", num_heads=3, img_size=(32, 128))
    assert again.grid == (2, 8)
    export(rectangular, tmp_path / "folder", "transformers")
    with pytest.raises(ValueError, match=r"image_size is \[32, 128\], expected 64"):
        pixio.from_pretrained(tmp_path / "folder")


@pytest.mark.parametrize("kind", ["safetensors", "transformers"])
def test_a_rectangular_encoder_comes_back_once_its_size_is_given(tmp_path, kind):
    rectangular = PixioViT((32, 64), embed_dim=48, depth=1, num_heads=3).eval()
    target = tmp_path / f"encoder.{kind}"
    line = export(rectangular, target, kind).splitlines()[0]
    if kind == "safetensors":
        assert line == f"pixio.from_pretrained({str(target)!r}, img_size=(32, 64))"
    with pytest.raises(ValueError, match=r"8 patch positions .* pass img_size=\(height, width\)"):
        pixio.from_pretrained(target, num_heads=3)
    again = pixio.from_pretrained(target, num_heads=3, img_size=(32, 64))
    assert again.grid == rectangular.grid
    if kind == "transformers":
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"image_size": [1, 2]}))
        with pytest.raises(ValueError, match="pass img_size"):
            pixio.from_pretrained(target, num_heads=3, img_size=(32, 64))
    torch.testing.assert_close(again.state_dict(), rectangular.state_dict(), rtol=0, atol=0)


@torch.inference_mode()
def test_the_examples_of_transformers_documentation_run_on_the_folder(model, folder, photo):
    processor = AutoImageProcessor.from_pretrained(folder)
    twin = AutoModel.from_pretrained(folder)
    inputs = processor(images=photo, return_tensors="pt")
    outputs = twin(**inputs)
    features = model.forward_features(inputs["pixel_values"])
    for suffix, theirs in (("_norm", outputs.last_hidden_state), ("", outputs.hidden_states[-1])):
        assert_close(torch.cat([features[f"{kind}_tokens{suffix}"] for kind in ("cls", "patch")], 1), theirs)
    assert twin(**inputs, output_hidden_states=False).hidden_states is None
    lean = AutoModel.from_pretrained(folder, output_hidden_states=False)
    assert lean(**inputs).hidden_states is None


def test_the_line_for_transformers_states_memory_and_versions(exchanged, tmp_path):
    _, *remarks = convert(
        exchanged / "encoder.pth", tmp_path / "folder", "transformers", num_heads=3
    ).splitlines()
    mib = 5 * (8 + 16) * 48 * 4 / 2**20
    assert f"hidden_states is filled: {mib:.3g} MiB per image of 64x64" in remarks[0]
    assert "before 5.9 takes images of 64x64 only" in remarks[1]


@torch.inference_mode()
def test_one_class_token_in_place_of_eight_is_their_mean(model, exchanged, tmp_path):
    shown = convert(exchanged / "encoder.pth", tmp_path / "one", "transformers", num_heads=3, cls="mean")
    assert "one class token, the mean of 8: the others are lost" in shown
    twin = AutoModel.from_pretrained(tmp_path / "one")
    state, theirs = model.state_dict(), twin.embeddings
    assert_close(state["cls_token"].mean(1, keepdim=True), theirs.cls_token)
    assert_close(state["pos_embed"][:, :8].mean(1), theirs.position_embeddings[:, 0])
    assert torch.equal(state["pos_embed"][:, 8:], theirs.position_embeddings[:, 1:])
    images = torch.randn(1, 3, 64, 64)
    outputs = twin(images)
    assert outputs.last_hidden_state.shape == (1, 1 + 16, 48)
    assert_close(outputs.last_hidden_state[:, 0], outputs.pooler_output)
    ours = pixio.from_pretrained(tmp_path / "one").forward_features(images)
    assert_close(ours["patch_tokens_norm"], outputs.last_hidden_state[:, 1:])  # as DPT strips the first
    assert model.n_cls_tokens == 8


def test_half_precision_reaches_transformers_as_it_is(model, tmp_path):
    convert(
        save(model, tmp_path / "half.pth", torch.bfloat16), tmp_path / "half", "transformers", num_heads=3
    )
    assert AutoModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_fractional_mlp_ratio_is_refused_where_transformers_has_none(tmp_path):
    source = save(random_encoder(mlp_ratio=2.5), tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match=r"integer MLP ratios only, this model 2\.5"):
        convert(source, tmp_path / "folder", "transformers", num_heads=3)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pth"]


# --- transformers, inwards


@pytest.mark.parametrize("kind", [PixioModel, PixioBackbone])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_what_transformers_saves_loads_here(model, folder, tmp_path, kind, shard_size):
    kind.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "1GB")
    loaded = pixio.from_pretrained(tmp_path)
    assert loaded.num_heads == 3
    assert_same_state(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", [PixioModel, PixioBackbone])
def test_the_newest_key_names_load_here(model, folder, tmp_path, kind):
    save_file(kind.from_pretrained(folder).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert_same_state(pixio.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_of_the_two_norms_of_a_backbone_the_one_of_its_feature_maps_is_taken(model, folder, tmp_path):
    backbone = PixioBackbone.from_pretrained(folder).eval()
    torch.nn.init.normal_(backbone.layernorm.weight)
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    images = torch.randn(1, 3, 64, 64)
    loaded = pixio.from_pretrained(tmp_path / "backbone.safetensors", num_heads=3)
    (maps,) = loaded.get_intermediate_layers(images, reshape=True)
    assert_close(maps, backbone(images).feature_maps[0])


def test_builders_take_a_transformers_folder_and_check_its_heads(model, folder):
    loaded = pixio.pixio_vitpico16(folder, img_size=64, embed_dim=48, depth=4, num_heads=3)
    assert_same_state(loaded.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"made with 3 heads, the model has 4"):
        pixio.pixio_vitpico16(folder, img_size=64, embed_dim=48, depth=4, num_heads=4)


# --- round trips, timm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_cls_tokens", [8, 1])
@pytest.mark.parametrize("to", ["pth", "safetensors", "transformers", "timm"])
def test_a_round_trip_gives_every_bit(tmp_path, to, n_cls_tokens, dtype):
    source = save(random_encoder(n_cls_tokens=n_cls_tokens, depth=2), tmp_path / "source.pth", dtype)
    there = tmp_path / {"transformers": "there", "safetensors": "there.safetensors"}.get(to, "there.pth")
    convert(source, there, to, num_heads=3)
    convert(there, tmp_path / "back.pth", "pth", num_heads=3)
    assert_same_state(torch.load(tmp_path / "back.pth"), torch.load(source))


@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_tensors_cut_out_of_larger_ones_leave_the_rest_behind(model, tmp_path, to):
    state = dict(model.state_dict())
    state["norm.weight"] = torch.randn(10**6)[:96:2]
    torch.save(state, tmp_path / "cut.pth")
    convert(tmp_path / "cut.pth", tmp_path / f"own.{to}", to, num_heads=3)
    assert (tmp_path / f"own.{to}").stat().st_size < (tmp_path / "cut.pth").stat().st_size - 3 * 10**6
    assert_same_state(pixio.from_pretrained(tmp_path / f"own.{to}", num_heads=3).state_dict(), state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.inference_mode()
def test_timm_loads_the_file_strictly_by_name_and_gives_the_same_features(model, exchanged, tmp_path, suffix):
    source, target = exchanged / "encoder.pth", tmp_path / f"timm{suffix}"
    line = convert(source, target, "timm", num_heads=3)
    twin = eval(line, {"timm": timm}).eval()
    state = torch.load(target) if suffix == ".pth" else load_file(target)
    assert not any(twin.load_state_dict(state, strict=True))
    images = torch.randn(2, 3, 64, 64)
    ours = model.forward_features(images)
    tokens = torch.cat([ours["cls_tokens_norm"], ours["patch_tokens_norm"]], dim=1)
    assert_close(tokens, twin.forward_features(images))


def timm_line(exchanged, target: Path, **arguments):
    """The line that `convert` prints for timm with more arguments, run, and the remarks below it."""
    line, *remarks = convert(exchanged / "encoder.pth", target, "timm", num_heads=3).splitlines()
    calls = []
    eval(line, {"timm": SimpleNamespace(create_model=lambda *names, **given: calls.append((names, given)))})
    ((names, given),) = calls
    return timm.create_model(*names, **given | arguments).eval(), remarks


@pytest.mark.parametrize("name", ["folder", "timm.pth", "timm.safetensors"])
def test_timm_prepares_images_as_pixio_does(exchanged, photo, tmp_path, name):
    twin, _ = timm_line(exchanged, tmp_path / name)
    config = timm.data.resolve_model_data_config(twin)
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()} == {
        "input_size": (3, 64, 64),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    photo.save(tmp_path / "photo.png")
    theirs = timm.data.create_transform(**config)(photo)
    assert (pixio.transform(64)(tmp_path / "photo.png") - theirs).abs().max() < 2.5 / 255 / 0.224


@pytest.mark.parametrize("name", ["folder", "timm.pth"])
@torch.inference_mode()
def test_timm_takes_its_usual_arguments_with_the_printed_line(model, exchanged, tmp_path, name):
    images = torch.randn(2, 3, 64, 64)
    ours = model.forward_features(images)
    (tmp_path / "a").mkdir()
    twin, _ = timm_line(exchanged, tmp_path / "a" / name)
    assert_close(ours["cls_tokens_norm"][:, 0], twin(images))
    (tmp_path / "b").mkdir()
    classifier, _ = timm_line(exchanged, tmp_path / "b" / name, num_classes=10)
    assert classifier(images).shape == (2, 10)
    assert_close(ours["patch_tokens_norm"], classifier.forward_features(images)[:, 8:])
    (tmp_path / "c").mkdir()
    backbone, _ = timm_line(exchanged, tmp_path / "c" / name, features_only=True, out_indices=(1, 3))
    maps = model.get_intermediate_layers(images, [1, 3], reshape=True, norm=False)
    for expected, found in zip(maps, backbone(images), strict=True):
        assert_close(expected, found)
    (tmp_path / "d").mkdir()
    larger, _ = timm_line(exchanged, tmp_path / "d" / name, img_size=128)
    images = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(
        model.forward_features(images)["patch_tokens_norm"],
        larger.forward_features(images)[:, 8:],
        atol=5e-3,  # timm resizes positions with an antialiased kernel, also upwards
        rtol=0,
    )


@torch.inference_mode()
def test_the_line_for_timm_says_how_to_get_the_mean_of_the_class_tokens(model, exchanged, tmp_path):
    twin, (*_, remark) = timm_line(exchanged, tmp_path / "folder")
    images = torch.randn(2, 3, 64, 64)
    assert "pools the first of the 8 class tokens" in remark
    mean = eval(remark.rpartition("mean: ")[2], {"model": twin, "images": images})
    assert_close(model.forward_features(images)["cls_tokens_norm"].mean(1), mean)


@torch.inference_mode()
def test_a_timm_model_without_positions_for_class_tokens_loads_here(exchanged, tmp_path):
    sizes = sizes_of(pixio.from_pretrained(exchanged / "encoder.pth", num_heads=3))
    twin = timm.create_model(
        "vit_base_patch16_224", num_classes=0, no_embed_class=True, **timm_arguments(sizes | {"num_heads": 3})
    ).eval()
    torch.save(twin.state_dict(), tmp_path / "timm.pth")
    images = torch.randn(1, 3, 64, 64)
    ours = pixio.from_pretrained(tmp_path / "timm.pth", num_heads=3).forward_features(images)
    tokens = torch.cat([ours["cls_tokens_norm"], ours["patch_tokens_norm"]], dim=1)
    assert_close(tokens, twin.forward_features(images))


# --- ONNX, export


@pytest.mark.parametrize(
    ("limits", "declared", "inputs"),
    [
        ({}, ["batch", 3, "height", "width"], [(3, 3, 64, 64), (1, 3, 96, 32), (2, 3, 80, 112)]),
        ({"batch": 2, "size": (64, 96)}, [2, 3, 64, 96], [(2, 3, 64, 96)]),
    ],
    ids=["dynamic", "fixed"],
)
def test_onnx_gives_the_native_numbers(model, exchanged, tmp_path, limits, declared, inputs):
    convert(exchanged / "encoder.pth", tmp_path / "encoder.onnx", "onnx", num_heads=3, **limits)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    assert session.get_inputs()[0].shape == declared
    for shape in inputs:
        images = torch.randn(shape)
        with torch.inference_mode():
            features = model.forward_features(images)
        for name, found in zip(
            ONNX_OUTPUTS, session.run(ONNX_OUTPUTS, {"images": images.numpy()}), strict=True
        ):
            torch.testing.assert_close(features[name], torch.from_numpy(found), atol=5e-5, rtol=0)


def test_large_onnx_models_keep_their_weights_beside_them(exchanged, tmp_path, monkeypatch):
    monkeypatch.setattr(pixio.weights.export, "_ONNX_INLINE", 1000)
    limits = {"batch": 1, "size": (64, 64)}
    convert(exchanged / "encoder.pth", tmp_path / "encoder.onnx", "onnx", num_heads=3, **limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
    images = np.zeros((1, 3, 64, 64), np.float32)
    assert len(onnxruntime.InferenceSession(tmp_path / "encoder.onnx").run(None, {"images": images})) == 4


def test_torch_export_serves_any_batch_and_size(model):
    height, width = Dim("height", max=64), Dim("width", max=64)
    shapes = {"images": {0: Dim("batch"), 2: 16 * height, 3: 16 * width}, "block_ids": [None]}
    program = torch.export.export(model, (torch.zeros(2, 3, 80, 96), [-1]), dynamic_shapes=shapes)
    for shape in [(2, 3, 80, 96), (5, 3, 64, 64), (3, 3, 32, 128)]:
        images = torch.randn(shape)
        exported, eager = program.module()(images, [-1])[0], model.forward_features(images)
        for key, value in eager.items():
            assert_close(value, exported[key])


@pytest.mark.parametrize("shape", [(1, 3, 72, 64), (1, 3, 64, 72), (2, 3, 63, 63), (1, 3, 80, 97)])
def test_onnx_refuses_sizes_that_would_lose_a_border_and_says_why(exchanged, tmp_path, shape):
    convert(exchanged / "encoder.pth", tmp_path / "encoder.onnx", "onnx", num_heads=3)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    session.run(None, {"images": np.zeros((1, 3, 32, 48), np.float32)})
    with pytest.raises(Exception, match="height_and_width_of_images_must_be_multiples_of_16"):
        session.run(None, {"images": np.zeros(shape, np.float32)})


@pytest.mark.parametrize(("size", "stored"), [(None, [64, 64]), ((32, 48), [32, 48])])
def test_onnx_holds_mean_std_and_size_of_its_images(exchanged, tmp_path, size, stored):
    convert(exchanged / "encoder.pth", tmp_path / "encoder.onnx", "onnx", num_heads=3, size=size)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(facts["std"]) == [0.229, 0.224, 0.225]
    assert json.loads(facts["size"]) == stored
    assert json.loads(facts["patch_size"]) == 16


# --- convert


def test_a_training_checkpoint_gives_its_encoder_and_needs_no_heads(model, tmp_path):
    mae = pixio.PixioMAE(model, 32, 1, 2, mask_grid=2)
    config = {"model": "pixio_vitx16_enc48x4h3_dec32x1h2"}
    torch.save({"model": mae.state_dict(), "config": config}, tmp_path / "checkpoint.pt")
    convert(tmp_path / "checkpoint.pt", tmp_path / "folder", "transformers")
    assert json.loads((tmp_path / "folder/config.json").read_text())["num_attention_heads"] == 3
    assert_same_state(pixio.from_pretrained(tmp_path / "folder").state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("a.pth", {"to": "pht"}, r"unknown format 'pht': choose one of pth, safetensors"),
        ("a.pth", {"to": "safetensors"}, r"inferred from its suffix, name it a\.safetensors"),
        ("a.safetensors", {"to": "pth"}, r"inferred from its suffix, name it a\.pth"),
        ("a.pth", {"to": "pth", "batch": 2}, r"batch and size belong to onnx"),
        ("a.onnx", {"to": "onnx", "size": (64, 50)}, r"multiples of the patch size"),
        ("a", {"to": "transformers", "num_heads": None}, r"width 48 with 4 blocks.*pass num_heads"),
        ("nowhere/a.pth", {"to": "pth"}, r"no folder .*nowhere"),
        ("taken", {"to": "pth"}, r"taken exists: remove it or choose another name"),
    ],
)
def test_mistakes_are_named_and_leave_nothing_behind(exchanged, tmp_path, target, options, message):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises((ValueError, OSError), match=message):
        convert(exchanged / "encoder.pth", tmp_path / target, **{"num_heads": 3, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("to", "target"),
    [
        ("pth", "a.pth"),
        ("safetensors", "a.safetensors"),
        ("transformers", "a"),
        ("timm", "a"),
        ("timm", "a.pth"),
        ("timm", "a.safetensors"),
        ("onnx", "a.onnx"),
    ],
)
def test_a_disk_that_fills_up_is_one_line_and_nothing_is_left_half_written(tmp_path, to, target):
    model = random_encoder(depth=1)
    limits = {"batch": 1, "size": (64, 64)} if to == "onnx" else {}
    with largest_file(2**17), pytest.raises(OSError, match="cannot write") as caught:
        export(model, tmp_path / target, to, **limits)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"cannot write {tmp_path / target}: File too large (more needed than the ")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_no_encoder_is_not_converted(model, tmp_path):
    state = dict(model.state_dict(), extra=torch.zeros(2))
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="unexpected extra"):
        convert(tmp_path / "odd.pth", tmp_path / "odd.safetensors", "safetensors", num_heads=3)


def test_transformers_names_are_renamed_without_a_remainder(model):
    state = key_mapping.to_transformers(model.state_dict())
    assert key_mapping.is_transformers(state)
    assert key_mapping.from_transformers(state).keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="mixes two namings"):
        key_mapping.from_transformers(state | {"layers.0.layernorm_before.weight": torch.zeros(48)})


# --- the native interface


@torch.inference_mode()
def test_intermediate_layers_are_those_of_forward(model):
    images = torch.randn(2, 3, 64, 32)
    every = model(images)
    for n, ids in [(1, [3]), (4, [0, 1, 2, 3]), ([2, 0], [2, 0]), ((-1,), [3])]:
        for norm, suffix in [(True, "_norm"), (False, "")]:
            pairs = model.get_intermediate_layers(images, n, norm=norm, return_class_token=True)
            for (patches, cls_tokens), i in zip(pairs, ids, strict=True):
                assert torch.equal(patches, every[i][f"patch_tokens{suffix}"])
                assert torch.equal(cls_tokens, every[i][f"cls_tokens{suffix}"])
    assert all(torch.equal(value, every[-1][key]) for key, value in model.forward_features(images).items())


@torch.inference_mode()
def test_reshaped_layers_are_maps_with_the_patches_in_their_places(model):
    images = torch.randn(1, 3, 64, 96)
    (tokens,) = model.get_intermediate_layers(images)
    (maps,) = model.get_intermediate_layers(images, reshape=True)
    assert maps.shape == (1, 48, 4, 6)
    assert torch.equal(maps[0, :, 2, 5], tokens[0, 2 * 6 + 5])


@pytest.mark.parametrize("n", [0, 5, -1])
def test_an_impossible_number_of_layers_is_refused(model, n):
    with pytest.raises(ValueError, match=rf"n = {n}: the encoder has 4 blocks, ask for 1 to 4"):
        model.get_intermediate_layers(torch.zeros(1, 3, 64, 64), n)


def test_checkpointed_gradients_equal_plain_ones_and_activations_are_not_kept():
    model = random_encoder(drop_path=0.5).train()
    images = torch.randn(4, 3, 64, 64)
    gradients, kept = [], []
    for model.grad_checkpointing in (False, True):
        torch.manual_seed(1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x) or x, lambda x: x
        ):
            loss = model.forward_features(images)["patch_tokens_norm"].square().mean()
        kept.append(len(saved))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert kept[1] < kept[0] / 4


def test_3d_adaptor_gives_the_normed_map_and_the_class_tokens(model, exchanged):
    from pixio.models.uniception import EncoderInput, PixioEncoder

    encoder = PixioEncoder("pixio_vitpico16", "pixio", exchanged / "encoder.pth", True, **SIZES).eval()
    assert (encoder.patch_size, encoder.enc_embed_dim, encoder.data_norm_type) == (16, 48, "pixio")
    assert encoder.gradient_checkpointing
    images = torch.randn(2, 3, 64, 96)
    output = encoder(EncoderInput(image=images, data_norm_type="pixio"))
    expected = model.forward_features(images)
    assert output.features.shape == (2, 48, 4, 6)
    assert_close(output.features.flatten(2).transpose(1, 2), expected["patch_tokens_norm"])
    assert_close(output.registers.transpose(1, 2), expected["cls_tokens_norm"])
    output.features.sum().backward()
    assert encoder.model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_3d_adaptor_refuses_other_normalizations():
    from pixio.models.uniception import EncoderInput, PixioEncoder

    encoder = PixioEncoder("pixio_vitpico16")
    with pytest.raises(ValueError, match="normalized as 'dust3r', the encoder expects 'pixio'"):
        encoder(EncoderInput(image=torch.zeros(1, 3, 64, 64), data_norm_type="dust3r"))
    with pytest.raises(ValueError, match="wants the ImageNet statistics"):
        PixioEncoder("pixio_vitpico16", data_norm_type="dust3r")


def test_the_3d_encoder_takes_the_arguments_of_uniceptions_factory(model, exchanged):
    from pixio.models.uniception import EncoderInput, PixioEncoder

    source = exchanged / "encoder.pth"
    encoder = PixioEncoder(
        name="my encoder",
        data_norm_type="pixio",
        hf_model_name=source,
        size="huge",
        num_heads=SIZES["num_heads"],
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        gradient_checkpointing=False,
    )
    assert (encoder.name, encoder.size, encoder.n_cls_tokens) == ("my encoder", "huge", model.n_cls_tokens)
    images = torch.randn(2, 3, 64, 64)
    features = encoder(EncoderInput(image=images, data_norm_type="pixio")).features
    assert features.is_contiguous()
    assert_close(features.flatten(2).transpose(1, 2), model.forward_features(images)["patch_tokens_norm"])
    assert PixioEncoder("label", architecture="pixio_vitfemto16").enc_embed_dim == 64
    assert PixioEncoder("pixio_vitfemto16").data_norm_type == "pixio"


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_3d_encoder_reads_uniceptions_keys(model, exchanged, tmp_path, checkpointing):
    from pixio.models.uniception import PixioEncoder

    inner = r"\1inner." if checkpointing else r"\1"
    keys = {key: re.sub(r"^(blocks\.\d+\.)", inner, key) for key in model.state_dict()}
    theirs = {f"encoder.{keys[key]}": value for key, value in model.state_dict().items()}
    whole = torch.nn.ModuleDict({"encoder": PixioEncoder("pixio_vitpico16", **SIZES)})
    whole.load_state_dict(theirs)
    for key, value in model.state_dict().items():
        assert torch.equal(whole["encoder"].model.state_dict()[key], value), key
    whole.load_state_dict(whole.state_dict())  # its own keys too
    torch.save({"model": theirs | {"head.weight": torch.ones(2, 2)}}, tmp_path / "whole.pth")
    assert_close(pixio.from_pretrained(tmp_path / "whole.pth", num_heads=3).norm.weight, model.norm.weight)


def test_the_3d_encoder_equals_the_one_of_uniception(model, exchanged, monkeypatch):
    base = pytest.importorskip("uniception.models.encoders.base")
    native = importlib.import_module("uniception.models.encoders.pixio")
    from pixio.models.uniception import EncoderInput, PixioEncoder

    source = exchanged / "encoder.pth"
    monkeypatch.setattr(native.PixioEncoder, "get_pth_file", lambda *_, **__: source)
    theirs = native.PixioEncoder(name="label", data_norm_type="pixio", **SIZES, n_cls_tokens=8).eval()
    ours = PixioEncoder(name="label", hf_model_name=source, num_heads=SIZES["num_heads"]).eval()
    assert isinstance(ours, base.UniCeptionViTEncoderBase)
    for name in ("name", "size", "data_norm_type", "patch_size", "enc_embed_dim", "n_cls_tokens"):
        assert getattr(ours, name) == getattr(theirs, name), name
    given = EncoderInput(image=torch.randn(2, 3, 64, 96), data_norm_type="pixio")
    assert isinstance(ours(given), base.ViTEncoderOutput)
    assert_close(ours(given).features, theirs(given).features)
    ours.load_state_dict(theirs.state_dict())


def test_the_former_place_of_the_3d_encoder_still_works():
    with pytest.warns(DeprecationWarning, match=r"now pixio\.models\.uniception"):
        former = importlib.import_module("pixio.uniception")
    assert former.PixioEncoder is importlib.import_module("pixio.models.uniception").PixioEncoder


def test_everything_native_works_with_torch_alone(exchanged, tmp_path):
    """Imports of what torch does not bring are made to fail, as if it were not installed."""
    code = """
import sys
import warnings

ABSENT = "PIL cv2 huggingface_hub matplotlib numpy onnx onnxruntime onnxscript safetensors".split()
ABSENT += "submitit timm torchvision tqdm transformers webdataset yaml".split()

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
warnings.simplefilter("ignore")  # torch remarks on the lack of numpy
import torch, pixio, pixio.models.uniception
from pixio.weights.export import export

source, root, timm_file, safe_file = sys.argv[1:]
images = torch.zeros(1, 3, 64, 64)
model = pixio.from_pretrained(source, num_heads=3)
model.get_intermediate_layers(images, 2, reshape=True)
options = dict(img_size=64, embed_dim=48, depth=4, num_heads=3)
again = torch.hub.load(root, "pixio_vitpico16", source="local", pretrained=source, **options)
assert torch.equal(again.forward_features(images)["patch_tokens"], model(images)[-1]["patch_tokens"])
pixio.create_model("pixio_vitpico16_enc128x6h4_dec128x2h4")(torch.zeros(1, 3, 256, 256)).loss.backward()
export(model, timm_file, "timm")
assert pixio.from_pretrained(timm_file, num_heads=3).n_cls_tokens == 8
for source, package in ((safe_file, "safetensors"), ("nobody/nothing", "huggingface_hub")):
    try:
        pixio.from_pretrained(source)
    except ImportError as error:
        assert f"pip install {package}" in str(error), error
    else:
        raise AssertionError(source)
"""
    paths = [exchanged / "encoder.pth", ROOT, tmp_path / "timm.pth", exchanged / "transformers"]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, cwd=tmp_path)


def test_torch_hub_offers_every_encoder_and_asks_for_torch_only():
    hubconf = runpy.run_path(str(ROOT / "hubconf.py"))
    assert hubconf["dependencies"] == ["torch"]
    assert {*pixio.list_models(), "from_pretrained"} <= hubconf.keys()
