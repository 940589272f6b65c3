"""Weight files: every known layout loads strictly, everything else is one clear error that runs nothing."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

import pixio
from pixio import PixioViT
from pixio.models.registry import initialize_from
from pixio.weights.export import export
from pixio.weights.reading import read_file, training_config

OPTIONS = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "n_cls_tokens": 3}
NAME = "pixio_vitx16_enc48x2h3_dec32x2h2"


def small_encoder(pretrained=None, **options) -> PixioViT:
    return pixio.pixio_vitti16(pretrained, **{**OPTIONS, **options})


@pytest.fixture
def mae():
    torch.manual_seed(0)
    return pixio.PixioMAE(small_encoder(), 32, 2, 2, mask_grid=2, norm_pix_loss=False)


def release_checkpoint(mae, path, **arguments):
    """The release's layout: encoder and decoder flat under `model`, a pickled Namespace beside them."""
    flat = {key.removeprefix("encoder."): value for key, value in mae.state_dict().items()}
    args = argparse.Namespace(mask_grid=2, norm_pix_loss=False, output_dir=Path("/somewhere"), **arguments)
    torch.save({"model": flat, "optimizer": {}, "scaler": {}, "epoch": 3, "args": args}, path)
    return path


def our_checkpoint(mae, path):
    config = {"model": NAME, "mask_grid": 2, "norm_pix_loss": False}
    torch.save({"model": mae.state_dict(), "config": config, "step": 7}, path)
    return path


def assert_same_weights(first, second):
    for (name, a), (other, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_every_layout_gives_the_same_encoder(mae, tmp_path):
    encoder = mae.encoder
    torch.save(encoder.state_dict(), tmp_path / "released.pth")
    torch.save(encoder.state_dict(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(
        {f"module._orig_mod.{k}": v for k, v in encoder.state_dict().items()}, tmp_path / "wrapped.pth"
    )
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    release_checkpoint(mae, tmp_path / "release.pth")
    our_checkpoint(mae, tmp_path / "ours.pt")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    for file in files:
        assert_same_weights(small_encoder(file), encoder)


def test_half_precision_files_become_float32(mae, tmp_path):
    torch.save({k: v.bfloat16() for k, v in mae.encoder.state_dict().items()}, tmp_path / "half.pth")
    loaded = small_encoder(tmp_path / "half.pth")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters())


def test_weights_are_mapped_and_never_copied(mae, tmp_path, monkeypatch):
    torch.save(mae.encoder.state_dict(), tmp_path / "encoder.pth")
    read = pixio.weights.reading.read_file
    seen = {}
    monkeypatch.setattr(pixio.weights.reading, "read_file", lambda path: seen.setdefault("state", read(path)))
    model = small_encoder(tmp_path / "encoder.pth")
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == seen["state"][name].data_ptr(), name


@pytest.mark.parametrize("layout", ["ours", "release", "release without a name"])
def test_load_mae_rebuilds_encoder_and_decoder(mae, tmp_path, layout):
    path = tmp_path / "checkpoint.pth"
    heads = {}
    if layout == "ours":
        our_checkpoint(mae, path)
    elif layout == "release":
        release_checkpoint(mae, path, model=NAME)
    else:
        release_checkpoint(mae, path)
        with pytest.raises(ValueError, match="pass num_heads and decoder_num_heads"):
            pixio.load_mae(path)
        heads = {"num_heads": 3, "decoder_num_heads": 2}
    loaded = pixio.load_mae(path, **heads)
    assert_same_weights(loaded, mae)
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 4)
    assert torch.equal(loaded(images, noise=noise).loss, mae(images, noise=noise).loss)


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("layout", [our_checkpoint, release_checkpoint])
def test_training_starts_from_the_model_of_a_file_at_any_input_size(mae, tmp_path, layout, size):
    """It computes what the file's model computes at run time with images of that size."""
    path = layout(mae, tmp_path / "checkpoint.pth")
    fresh = pixio.PixioMAE(small_encoder(img_size=size), 32, 2, 2, mask_grid=2, norm_pix_loss=False)
    decoder_before = fresh.decoder_embed.weight.clone()
    images, noise = torch.randn(2, 3, size, size), torch.rand(2, (size // 32) ** 2)

    said = initialize_from(fresh, path)
    assert torch.equal(fresh.encoder(images)[-1]["patch_tokens"], mae.encoder(images)[-1]["patch_tokens"])
    assert torch.equal(fresh.decoder_embed.weight, decoder_before)
    assert said == initialize_from(fresh, path, decoder=True)
    assert torch.equal(fresh(images, noise=noise).pred, mae(images, noise=noise).pred)
    assert said == ("" if size == 64 else f"positions of {path} resized from 4 x 4 to 6 x 6 patches")
    assert all(parameter.requires_grad for parameter in fresh.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_cls_tokens": 8}, r"n_cls_tokens 3 \(the model has 8\)"),
        ({"num_heads": 4}, "was made with 3 heads, the model has 4"),
    ],
)
def test_training_does_not_start_from_another_model(mae, tmp_path, options, message):
    path = release_checkpoint(mae, tmp_path / "checkpoint.pth", model=NAME)
    other = pixio.PixioMAE(small_encoder(**{"img_size": 96, **options}), 32, 2, 2, mask_grid=2)
    with pytest.raises(ValueError, match=message):
        initialize_from(other, path, decoder=True)


def test_training_does_not_start_from_another_decoder(mae, tmp_path):
    path = release_checkpoint(mae, tmp_path / "checkpoint.pth", model=NAME)
    for heads, depth, message in (
        (4, 2, "2 decoder heads, the model has 4"),
        (2, 3, "missing decoder_blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize_from(
                pixio.PixioMAE(small_encoder(), 32, depth, heads, mask_grid=2), path, decoder=True
            )
    torch.save(mae.encoder.state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="no decoder"):
        initialize_from(mae, tmp_path / "encoder.pth", decoder=True)


def test_an_encoder_file_is_no_training_checkpoint(mae, tmp_path):
    torch.save(mae.encoder.state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="no decoder"):
        pixio.load_mae(tmp_path / "encoder.pth")


def test_missing_and_unexpected_keys_are_named(mae, tmp_path):
    state = dict(mae.encoder.state_dict())
    state["head.weight"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd.pth.*missing norm.weight.*; unexpected head.weight"):
        small_encoder(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 128}, r"img_size 64 \(the model has 128\).*resized to other inputs at run time"),
        ({"n_cls_tokens": 8}, r"n_cls_tokens 3 \(the model has 8\)"),
        ({"embed_dim": 96}, r"embed_dim 48 \(the model has 96\)"),
        ({"depth": 3}, r"depth 2 \(the model has 3\)"),
        ({"patch_size": 8, "img_size": 32}, r"patch_size 16 \(the model has 8\)"),
    ],
)
def test_a_wrong_size_says_what_the_file_was_made_with(mae, tmp_path, options, message):
    torch.save(mae.encoder.state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match=message):
        small_encoder(tmp_path / "encoder.pth", **options)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weight file at .*nowhere.pth"):
        small_encoder(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("size", [0, 100, -50])
def test_a_truncated_file_says_so(mae, tmp_path, suffix, size):
    path = tmp_path / f"cut{suffix}"
    state = mae.encoder.state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"is not a readable weight file.*copy or download it again"):
        small_encoder(path)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_with_foreign_objects_is_refused_and_not_executed(mae, tmp_path):
    target = str(tmp_path / "executed")
    torch.save({"model": mae.state_dict(), "args": Payload(target)}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"the pickle names posix.mkdir.*only tensors"):
        small_encoder(tmp_path / "evil.pth")
    assert not os.path.exists(target)


@pytest.mark.parametrize(
    "content", [[1, 2], {"weights": 3}, {"model": {"a": "text"}}, {"model": {1: torch.zeros(2)}}]
)
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"expected a state dict|holds no state dict"):
        small_encoder(tmp_path / "other.pth")


def test_integer_weights_are_refused(mae, tmp_path):
    torch.save({k: v.to(torch.int8) for k, v in mae.encoder.state_dict().items()}, tmp_path / "int.pth")
    with pytest.raises(ValueError, match="not plain floating point"):
        small_encoder(tmp_path / "int.pth")


# --- containers and prefixes of training code


def inside(part: str):
    """Names of a block's tensors with a part that a wrapper around each block leaves."""
    return lambda key: re.sub(r"^(blocks\.\d+\.)", rf"\1{part}.", key)


IN_FRONT = (
    *("module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."),
    *("model.", "vit.", "backbone.", "encoder.", "student.backbone.", "model.encoder."),
    *("encoder._orig_mod.", "teacher.module.backbone."),
)
PREFIXES = {
    **{prefix: prefix.__add__ for prefix in IN_FRONT},
    **{part: inside(part) for part in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")},
    "uniception": lambda key: f"encoder.{inside('inner')(key)}",
    "everywhere": lambda key: f"_fsdp_wrapped_module.{inside('_checkpoint_wrapped_module._orig_mod')(key)}",
}
CONTAINERS = {
    "flat": lambda state: state,
    "with plain values": lambda state: {**state, "epoch": 3, "best": np.float64(0.5), "name": "run"},
    "state_dict": lambda state: {"state_dict": state, "epoch": 1, "loss": torch.tensor(0.5)},
    "model_state": lambda state: {"model_state": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "model_state_dict": lambda state: {"model_state_dict": state, "rng": torch.zeros(8, dtype=torch.uint8)},
    "nested": lambda state: {"model": {"state_dict": state}},
    "own name": lambda state: {"net": state, "head": {"weight": torch.ones(2, 2)}, "step": torch.ones(1)},
    "with an average": lambda state: {"model": state, "model_ema": {k: v + 1 for k, v in state.items()}},
    "averaged": lambda state: {"n_averaged": torch.tensor(5), **{f"module.{k}": state[k] for k in state}},
    "student": lambda state: (
        state | {"last_proj.0.weight": torch.ones(2, 2), "last_proj.3.bias": torch.ones(2)}
    ),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_stripped_in_front_and_inside(mae, tmp_path, prefix):
    torch.save({PREFIXES[prefix](k): v for k, v in mae.encoder.state_dict().items()}, tmp_path / "w.pth")
    assert_same_weights(small_encoder(tmp_path / "w.pth"), mae.encoder)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_state_dict_is_found_in_what_training_code_saves(mae, tmp_path, container):
    torch.save(CONTAINERS[container](dict(mae.encoder.state_dict())), tmp_path / "w.pth")
    assert_same_weights(small_encoder(tmp_path / "w.pth"), mae.encoder)


def test_an_averaged_model_of_torch_loads(mae, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(mae)
    torch.save({"model": averaged.state_dict()}, tmp_path / "averaged.pth")
    assert_same_weights(small_encoder(tmp_path / "averaged.pth"), mae.encoder)
    loaded = pixio.load_mae(tmp_path / "averaged.pth", num_heads=3, decoder_num_heads=2, mask_grid=2)
    assert_same_weights(loaded, mae)


def test_an_encoder_is_taken_out_of_the_model_around_it(mae, tmp_path):
    state = {f"backbone.{key}": value for key, value in mae.encoder.state_dict().items()}
    torch.save({"state_dict": state | {"head.weight": torch.ones(5, 2)}}, tmp_path / "detector.pth")
    assert_same_weights(small_encoder(tmp_path / "detector.pth"), mae.encoder)
    torch.save({"state_dict": state | {"backbone.extra": torch.ones(5)}}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="unexpected extra"):
        small_encoder(tmp_path / "odd.pth")


def test_of_two_encoders_in_a_file_neither_is_guessed(mae, tmp_path):
    state = mae.encoder.state_dict()
    torch.save({"student": state, "teacher": state}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match="several state dicts, student, teacher: save one"):
        small_encoder(tmp_path / "two.pth")
    torch.save({f"{who}.{key}": state[key] for who in ("a", "b") for key in state}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"several encoders, under a\., b\.: save one"):
        small_encoder(tmp_path / "two.pth")


def test_a_name_found_twice_is_refused(mae, tmp_path):
    state = mae.encoder.state_dict()
    torch.save({**state, "module.norm.bias": state["norm.bias"]}, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match=r"module.norm.bias and another key both stand for norm.bias"):
        small_encoder(tmp_path / "twice.pth")


def test_what_does_not_fit_is_shown_with_its_nearest_key_and_no_guess(mae, tmp_path):
    state = dict(mae.encoder.state_dict())
    state["norms.weight"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(
        ValueError, match=r"missing norm.weight \(nearest keys: norm.weight ~ norms.weight"
    ) as error:
        small_encoder(tmp_path / "odd.pth")
    assert "version" not in str(error.value)
    state["position_embed"] = state.pop("pos_embed")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"missing pos_embed .*pos_embed ~ position_embed"):
        pixio.from_pretrained(tmp_path / "odd.pth")


# --- what is found in the place of a weight file


def scripted(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "HTML page.*download"),
        (b"\xef\xbb\xbf\n  <html lang='en'>", "HTML page"),
        (
            safetensors.torch.save({"norm.weight": torch.ones(2)}),
            r"safetensors file: rename it to w\.safetensors",
        ),
        (scripted, "TorchScript"),
    ],
)
def test_other_kinds_of_files_are_named_and_nothing_unsafe_is_advised(tmp_path, content, message):
    path = tmp_path / "w.pth"
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"w.pth .*bytes. is an? .*{message}") as error:
        pixio.from_pretrained(path)
    assert "weights_only" not in str(error.value)
    if message.startswith(("Git", "HTML")):
        path = path.rename(tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=message):
            pixio.from_pretrained(path)


def test_a_torch_file_named_safetensors_is_named(mae, tmp_path):
    torch.save(mae.encoder.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"torch.save: rename it to w\.pth"):
        pixio.from_pretrained(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "value", [np.float32(1), np.int64(3), np.bool_(True), np.arange(4), np.array(["a"], object)]
)
def test_numpy_values_beside_weights_are_skipped(mae, tmp_path, value):
    torch.save({"model": mae.state_dict(), "best": value, "args": {"lr": value}}, tmp_path / "w.pth")
    assert_same_weights(small_encoder(tmp_path / "w.pth"), mae.encoder)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_numpy_values_in_the_configuration_of_a_checkpoint_count(mae, tmp_path, kind):
    config = {
        "mask_grid": kind(2),
        "norm_pix_loss": np.bool_(False),
        "model": np.str_(NAME),
        "lr": np.ones(2),
    }
    torch.save({"model": mae.state_dict(), "args": argparse.Namespace(**config)}, tmp_path / "w.pth")
    loaded = pixio.load_mae(tmp_path / "w.pth")
    assert (loaded.mask_grid, loaded.norm_pix_loss) == (2, False)
    assert loaded(torch.zeros(1, 3, 64, 64)).mask.sum() == 12
    assert training_config(read_file(tmp_path / "w.pth")) == config | {"lr": None}


# --- folders and the Hugging Face hub


@pytest.fixture
def folder(mae, tmp_path):
    """A transformers folder; everything beside it in `tmp_path` is outside."""
    torch.save(mae.encoder.state_dict(), tmp_path / "encoder.pth")
    export(mae.encoder, tmp_path / "folder", "transformers")
    return tmp_path / "folder"


def shard(folder):
    """Split the weights of a folder into two files and an index, as transformers does."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": sorted(state)[::2], "b.safetensors": sorted(state)[1::2]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / name)
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_from_pretrained_finds_the_architecture(mae, folder, tmp_path):
    our_checkpoint(mae, tmp_path / "ours.pt")
    torch.save(pixio.pixio_vitpico16().state_dict(), tmp_path / "pico.pth")
    for source in (folder, tmp_path / "ours.pt"):
        loaded = pixio.from_pretrained(source, drop_path=0.1)
        assert (loaded.num_heads, loaded.img_size, loaded.n_cls_tokens) == (3, (64, 64), 3)
        assert loaded.drop_path == 0.1
        assert_same_weights(loaded, mae.encoder)
    assert pixio.from_pretrained(tmp_path / "pico.pth").num_heads == 4


def test_heads_that_nothing_names_are_asked_for(mae, folder, tmp_path):
    with pytest.raises(ValueError, match=r"width 48 with 2 blocks matches no known model.*pass num_heads"):
        pixio.from_pretrained(tmp_path / "encoder.pth")
    assert_same_weights(pixio.from_pretrained(tmp_path / "encoder.pth", num_heads=3), mae.encoder)
    with pytest.raises(ValueError, match=r"was made with 3 heads, the model has 4"):
        pixio.from_pretrained(folder, num_heads=4)


def test_sharded_weights_load_by_their_index(mae, folder):
    shard(folder)
    assert_same_weights(pixio.from_pretrained(folder), mae.encoder)


def test_a_folder_with_one_weight_file_of_any_name_loads(mae, tmp_path):
    (tmp_path / "run").mkdir()
    our_checkpoint(mae, tmp_path / "run" / "step_00000007.pt")
    assert_same_weights(small_encoder(tmp_path / "run"), mae.encoder)
    our_checkpoint(mae, tmp_path / "run" / "step_00000008.pt")
    with pytest.raises(FileNotFoundError, match=r"holds step_00000007.pt, step_00000008.pt; expected"):
        small_encoder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no weight file; expected model.safetensors"):
        small_encoder(tmp_path / "empty")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A function that puts a file or a folder into an empty cache of the hub, which is set to offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repository, *files):
        root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        revision = "0123456789abcdef0123456789abcdef01234567"
        snapshot = root / "snapshots" / revision
        for place in (root / "refs", root / "blobs", snapshot):
            place.mkdir(parents=True)
        (root / "refs" / "main").write_text(revision)
        for i, file in enumerate(files):
            shutil.copy(file, root / "blobs" / f"{i:040x}")
            (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
        return snapshot

    return put


def test_a_cached_repository_loads_offline_by_its_id_or_its_folder(mae, folder, hub_cache):
    snapshot = hub_cache("someone/pixio-tiny", *folder.iterdir())
    assert_same_weights(pixio.from_pretrained("someone/pixio-tiny"), mae.encoder)
    assert_same_weights(small_encoder("someone/pixio-tiny"), mae.encoder)
    assert_same_weights(pixio.from_pretrained(snapshot), mae.encoder)


def test_a_cached_repository_with_a_pth_file_alone_loads(mae, folder, hub_cache, tmp_path):
    hub_cache("someone/pixio-tiny", tmp_path / "encoder.pth")
    assert_same_weights(small_encoder("someone/pixio-tiny"), mae.encoder)


def test_a_repository_that_is_not_in_the_cache_says_so_offline(hub_cache):
    with pytest.raises(FileNotFoundError, match=r"not in the cache.*HF_HUB_OFFLINE.*hf download facebook/p"):
        pixio.from_pretrained("facebook/pixio-vith16")


def test_a_repository_without_weights_says_so(folder, hub_cache):
    hub_cache("someone/pixio-tiny", folder / "config.json")
    with pytest.raises(FileNotFoundError, match=r"someone/pixio-tiny: no model.safetensors"):
        pixio.from_pretrained("someone/pixio-tiny")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            errors.GatedRepoError,
            ValueError,
            r"request access at https://huggingface.co/a/b .*hf auth login",
        ),
        (errors.RepositoryNotFoundError, FileNotFoundError, r"no file or folder /.*/a/b, and no repo"),
        (errors.HfHubHTTPError, ValueError, r"https://huggingface.co/a/b cannot be downloaded: 503"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_error(monkeypatch, error, kind, message):
    def refuse(*_, **__):
        refusal = error.__new__(error)
        refusal.args = ("503 Server Error\n\nTrace",)
        raise refusal

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match=message):
        pixio.from_pretrained("a/b")


def test_weights_are_preferred_to_pickles_and_nothing_else_is_downloaded(mae, folder, monkeypatch):
    asked = []

    def download(repository, allow_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same_weights(pixio.from_pretrained("a/b"), mae.encoder)
    assert asked == [["config.json", "model*.safetensors", "model.safetensors.index.json"]]


def test_a_local_folder_comes_before_a_repository_of_the_same_name(mae, folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert_same_weights(pixio.from_pretrained(f"{folder.parent.name}/folder"), mae.encoder)


# --- broken and hostile folders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10**15}, r"hidden_size is 1000000000000000, expected 48"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers is -1, expected 2"),
        ({"image_size": [64, 10**9]}, r"image_size is \[64, 1000000000\], expected 64"),
        ({"num_attention_heads": 10**12}, r"num_attention_heads is 1000000000000, which does not divide"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0"),
        ({"num_attention_heads": "3"}, r"num_attention_heads is '3'"),
        ({"num_attention_heads": {"a": "b" * 10**6}}, r"num_attention_heads is \{'a': 'b{70,80}, which"),
        ({"layer_norm_eps": 1e-5}, r"layer_norm_eps is 1e-05, expected 1e-06"),
        ({"hidden_act": "gelu_new"}, r"hidden_act is 'gelu_new', expected 'gelu'"),
        ({"model_type": "dinov2"}, r"model_type is 'dinov2', expected 'pixio'"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(folder, change, message):
    edit(folder / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        pixio.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "[" * 10**6, '{"a": 1' + "0" * 10**5 + "}", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_broken_json_file_is_named(folder, name, text):
    shard(folder)
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{name} (cannot be read as JSON|holds a list)"):
        pixio.from_pretrained(folder)


def test_a_huge_json_file_is_not_read(folder, monkeypatch):
    monkeypatch.setattr("pixio.files.MAX_JSON", 100)
    with pytest.raises(ValueError, match=r"config.json cannot be read as JSON: [\d,]+ bytes, at most 100"):
        pixio.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/outside.safetensors", "..", "", "sub/../a.safetensors", "evil.pth", 3],
)
def test_an_index_leads_nowhere_but_to_shards_beside_it(folder, name):
    weight_map = shard(folder)
    shutil.copy(folder / "a.safetensors", folder.parent / "outside.safetensors")
    shutil.copy(folder.parent / "encoder.pth", folder / "evil.pth")
    weight_map = {key: name if file == "a.safetensors" else file for key, file in weight_map.items()}
    edit(folder / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match=r"is not the plain name of|has no weight_map"):
        pixio.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("target", ["../outside", "../folder_blobs/outside"])
def test_a_link_out_of_the_folder_is_refused(folder, name, target):
    (folder.parent / "folder_blobs").mkdir()
    (folder / name).rename(folder / target)
    (folder / name).symlink_to(target)
    with pytest.raises(ValueError, match=rf"{name} leads out of its folder, to .*outside"):
        pixio.from_pretrained(folder)


def test_a_link_out_of_a_cached_repository_is_refused(folder, hub_cache):
    snapshot = hub_cache("someone/pixio-tiny", *folder.iterdir())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match="leads out of its folder"):
        pixio.from_pretrained("someone/pixio-tiny")


def test_shards_that_disagree_with_their_index_are_refused(folder):
    weight_map = shard(folder)
    first = next(iter(weight_map))
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[weight_map[first]]
    edit(folder / "model.safetensors.index.json", weight_map=weight_map | {first: other})
    with pytest.raises(ValueError, match=r"disagree on .*download both again"):
        pixio.from_pretrained(folder)
    (folder / "a.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weight file at .*a.safetensors"):
        pixio.from_pretrained(folder)


def safetensors_header(path, change):
    """Rewrite the header of a safetensors file; the tensors behind it stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def overlap(header):
    header["norm.weight"]["data_offsets"] = header["norm.bias"]["data_offsets"]


def beyond(header):
    header["norm.weight"]["data_offsets"] = [10**12, 10**12 + 192]


def inflate(header):
    header["pos_embed"]["shape"] = [1, 10**9, 10**9]


def invent(header):
    header["norm.weight"]["dtype"] = "F4096"


@pytest.mark.parametrize("change", [overlap, beyond, inflate, invent])
def test_a_safetensors_file_with_a_lying_header_is_refused(mae, tmp_path, change):
    path = tmp_path / "lying.safetensors"
    save_file(mae.encoder.state_dict(), path)
    safetensors_header(path, change)
    with pytest.raises(ValueError, match=r"is not a readable weight file"):
        small_encoder(path)


def test_a_safetensors_file_with_an_absurd_header_length_is_refused(tmp_path):
    (tmp_path / "absurd.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"is not a readable weight file"):
        small_encoder(tmp_path / "absurd.safetensors")


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x.to(torch.complex64),
        lambda x: x.bool(),
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
    ],
    ids=["complex", "bool", "sparse", "meta"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_tensors_that_are_not_plain_numbers_are_refused(mae, tmp_path, odd):
    state = mae.encoder.state_dict()
    state["norm.weight"] = odd(state["norm.weight"])
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"not plain floating point: norm.weight"):
        small_encoder(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("cls_token", (1, 20, 48)),
        ("cls_token", ()),
        ("pos_embed", (1, 19, 0)),
        ("patch_embed.proj.weight", (0, 3, 16, 16)),
        ("patch_embed.proj.weight", (48, 3, 0, 0)),
        ("blocks.0.mlp.fc1.weight", ()),
    ],
)
def test_absurd_shapes_are_refused_before_anything_is_built(mae, tmp_path, key, shape):
    torch.save(dict(mae.encoder.state_dict()) | {key: torch.zeros(shape)}, tmp_path / "absurd.pth")
    with pytest.raises(ValueError, match=r"absurd.pth (is not a Pixio encoder|does not fit this model)"):
        pixio.from_pretrained(tmp_path / "absurd.pth", num_heads=3)


def test_a_folder_with_a_pickle_of_code_executes_nothing(mae, tmp_path):
    (tmp_path / "folder").mkdir()
    target = str(tmp_path / "executed")
    torch.save({"model": mae.state_dict(), "args": Payload(target)}, tmp_path / "folder" / "evil.pth")
    with pytest.raises(ValueError, match=r"the pickle names posix.mkdir"):
        pixio.from_pretrained(tmp_path / "folder")
    assert not os.path.exists(target)


@pytest.mark.parametrize("config", [[1], {"model": ["x"]}, "text", 3])
def test_an_odd_training_configuration_is_ignored(mae, tmp_path, config):
    torch.save({"model": mae.state_dict(), "config": config}, tmp_path / "checkpoint.pt")
    assert_same_weights(small_encoder(tmp_path / "checkpoint.pt"), mae.encoder)
