"""Weight files: every known layout loads strictly, everything else is one clear error that runs nothing."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pixio
from pixio import PixioViT

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
    read = pixio.weights.read_file
    seen = {}
    monkeypatch.setattr(pixio.weights, "read_file", lambda path: seen.setdefault("state", read(path)))
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


def test_an_encoder_file_is_no_training_checkpoint(mae, tmp_path):
    torch.save(mae.encoder.state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="no decoder"):
        pixio.load_mae(tmp_path / "encoder.pth")


def test_missing_and_unexpected_keys_are_named(mae, tmp_path):
    state = dict(mae.encoder.state_dict())
    state["head.weight"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd.pth.*missing norm.weight; unexpected head.weight"):
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


@pytest.mark.parametrize("content", [[1, 2], {"weights": 3}, {"model": {"a": "text"}}])
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"expected a state dict|holds no state dict"):
        small_encoder(tmp_path / "other.pth")


def test_integer_weights_are_refused(mae, tmp_path):
    torch.save({k: v.to(torch.int8) for k, v in mae.encoder.state_dict().items()}, tmp_path / "int.pth")
    with pytest.raises(ValueError, match="not floating point"):
        small_encoder(tmp_path / "int.pth")
