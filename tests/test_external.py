"""Encoders of timm and transformers give, through `load_encoder`, what their own library computes."""

import copy
import json

import pytest
import timm
import torch
import transformers

import pixio
from pixio.images.normalization import normalize
from pixio.models.external import depth_of, fingerprint, load_encoder

TIMM = {  # name: options, each with another kind of tokens
    "timm/test_vit": {},
    "timm/test_vit2": {},
    "timm/vit_tiny_patch16_224": {"patch_size": 14, "img_size": 70, "depth": 2},
    "timm/vit_small_patch16_dinov3": {"depth": 2, "embed_dim": 48, "num_heads": 2},
    "timm/vit_small_patch14_reg4_dinov2": {"depth": 2, "embed_dim": 48, "num_heads": 2, "img_size": 70},
    "timm/deit_tiny_distilled_patch16_224": {"depth": 2},
    "timm/vit_base_patch16_siglip_gap_224": {"depth": 2, "embed_dim": 48, "num_heads": 2},
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}


def images(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize("name", TIMM)
def test_timm_encoders_give_timms_own_features_on_a_rectangle(name):
    encoder = load_encoder(name, **TIMM[name])
    pixels = images(3 * encoder.patch_size, 5 * encoder.patch_size)
    cfg = encoder.model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    outputs = []
    hook = encoder.model.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        final = encoder.model.forward_features((pixels / 255 - mean) / std)
        hook.remove()
        second, last = encoder(normalize(pixels), [1, -1])

    c = encoder.model.num_prefix_tokens
    assert (encoder.n_cls_tokens, depth_of(encoder)) == (c, len(encoder.model.blocks))
    assert last["patch_tokens_norm"].shape == (2, 15, encoder.embed_dim)
    assert last["cls_tokens_norm"].shape == (2, c, encoder.embed_dim)
    close(second["cls_tokens"], outputs[0][:, :c])
    close(second["patch_tokens"], outputs[0][:, c:])
    if isinstance(encoder.model.norm, torch.nn.Identity):  # moved behind the pooling, where it is fc_norm
        final = encoder.model.fc_norm(final)
    close(last["cls_tokens_norm"], final[:, :c])
    close(last["patch_tokens_norm"], final[:, c:])


def test_a_timm_classifier_file_loads_without_its_head(tmp_path):
    theirs = timm.create_model("test_vit", num_classes=7).eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "model.pth")
    encoder = load_encoder("timm/test_vit", tmp_path / "model.pth")
    mean, std = (torch.tensor(encoder.model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    pixels = images(160, 160)
    with torch.no_grad():
        close(
            encoder(normalize(pixels), [-1])[0]["patch_tokens_norm"],
            theirs.forward_features((pixels / 255 - mean) / std)[:, 1:],
        )


def test_a_file_that_does_not_fit_is_refused_with_the_difference(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    del state["norm.weight"]
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth does not fit timm/test_vit.*norm\.weight"):
        load_encoder("timm/test_vit", tmp_path / "model.pth")


# ----------------------------------------------------------------------------------------------- transformers


def save(folder, model, **preprocessor):
    model.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model.eval()


def dinov2(folder):
    config = transformers.Dinov2Config(**SIZES, patch_size=8)
    return save(folder, transformers.Dinov2Model(config))


def dinov2_with_registers(folder):
    config = transformers.Dinov2WithRegistersConfig(**SIZES, patch_size=8, num_register_tokens=3)
    return save(folder, transformers.Dinov2WithRegistersModel(config))


def pixio_folder(folder):
    config = transformers.PixioConfig(**SIZES, patch_size=8, n_cls_tokens=3)
    return save(folder, transformers.PixioModel(config))


@pytest.mark.parametrize(
    ("build", "c"),
    [(dinov2, 1), (dinov2_with_registers, 4), (pixio_folder, 3)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_transformers_folders_give_transformers_own_features_on_a_rectangle(build, c, tmp_path):
    theirs = build(tmp_path)
    encoder = load_encoder(f"hf/{tmp_path}")
    pixels = normalize(images(32, 48))
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True)
        features = encoder(pixels)
    assert (encoder.n_cls_tokens, encoder.patch_size, depth_of(encoder)) == (c, 8, 3)
    for block, hidden in zip(features, expected.hidden_states[1:], strict=True):
        close(block["cls_tokens"], hidden[:, :c])
        close(block["patch_tokens"], hidden[:, c:])
    close(features[-1]["cls_tokens_norm"], expected.last_hidden_state[:, :c])
    close(features[-1]["patch_tokens_norm"], expected.last_hidden_state[:, c:])


def test_vit_mae_sees_every_patch_in_order(tmp_path):
    sizes = {"intermediate_size": 64, "decoder_hidden_size": 32, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**SIZES, **sizes, patch_size=8, decoder_num_hidden_layers=1)
    whole = save(tmp_path, transformers.ViTMAEForPreTraining(config))  # the decoder is left out
    encoder = load_encoder(f"hf/{tmp_path}")
    pixels = normalize(images(32, 48))
    theirs = copy.deepcopy(whole.vit)
    theirs.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = theirs(pixels, interpolate_pos_encoding=True)  # shuffled at random
        order = expected.ids_restore.unsqueeze(-1).expand(-1, -1, 32)
        (features,) = encoder(pixels, [-1])
    close(features["patch_tokens_norm"], expected.last_hidden_state[:, 1:].gather(1, order))
    close(features["cls_tokens_norm"], expected.last_hidden_state[:, :1])


def test_the_normalization_of_a_folder_is_converted(tmp_path):
    config = transformers.Dinov2Config(**SIZES, patch_size=8)
    theirs = save(
        tmp_path, transformers.Dinov2Model(config), image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 1]
    )
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.5, 0.25, 1])[:, None, None]
    pixels = images(32, 32)
    with torch.no_grad():
        (features,) = load_encoder(f"hf/{tmp_path}")(normalize(pixels), [-1])
        expected = theirs((pixels / 255 - mean) / std).last_hidden_state
    close(features["cls_tokens_norm"], expected[:, :1])


def test_a_folder_that_does_not_normalize_gets_plain_pixels(tmp_path):
    config = transformers.Dinov2Config(**SIZES, patch_size=8)
    theirs = save(tmp_path, transformers.Dinov2Model(config), do_normalize=False, image_std=[0.5, 0.5, 0.5])
    pixels = images(32, 32)
    with torch.no_grad():
        (features,) = load_encoder(f"hf/{tmp_path}")(normalize(pixels), [-1])
        close(features["cls_tokens_norm"], theirs(pixels / 255).last_hidden_state[:, :1])


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"image_mean": 0.5}, "must be three numbers"),
        ({"image_mean": [float("nan"), 0, 0]}, "must be three numbers"),
        ({"image_std": [1, 1, 0]}, r"must be positive, found \[1, 1, 0\]"),
    ],
)
def test_impossible_statistics_are_refused(statistics, message, tmp_path):
    save(tmp_path, transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, patch_size=8)), **statistics)
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: image_\w+.* {message}"):
        load_encoder(f"hf/{tmp_path}")


def test_a_folder_whose_weights_lack_a_layer_is_refused(tmp_path):
    dinov2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"do not fit its config.*missing_keys.*layer\.3"):
        load_encoder(f"hf/{tmp_path}")


def test_a_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="bert model: known are pixio, dinov2"):
        load_encoder(f"hf/{tmp_path}")


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_encoder(f"hf/{tmp_path}")


# ------------------------------------------------------------------------------------------------ all of them


def test_sizes_of_a_pixio_file_are_read_off_it(tmp_path):
    model = pixio.create_model("pixio_vitpico16", img_size=64, n_cls_tokens=4)
    torch.save(model.state_dict(), tmp_path / "encoder.pth")
    encoder = load_encoder("pixio_vitpico16", tmp_path / "encoder.pth")
    assert (encoder.img_size, encoder.n_cls_tokens) == ((64, 64), 4)
    assert not encoder.training
    assert fingerprint(encoder) == fingerprint(model)


def test_the_fingerprint_tells_weights_apart():
    encoder = load_encoder("timm/test_vit")
    before = fingerprint(encoder)
    with torch.no_grad():
        encoder.model.blocks[-1].mlp.fc2.bias[0] += 1e-6
    assert fingerprint(encoder) != before


def test_blocks_after_the_last_one_wanted_are_not_run():
    encoder = load_encoder("timm/test_vit")
    encoder.model.blocks[1].register_forward_hook(lambda *args: pytest.fail("block 1 was run"))
    assert len(encoder(torch.zeros(1, 3, 32, 32), [0])) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pixio_vith14", "did you mean pixio_vith16"),
        ("timm/resnet18", "not a plain vision transformer"),
        ("timm/vit_smal_patch16_224", "unknown.*vit_small_patch16_224"),
        ("dinov2/vits", "expected pixio_…, timm/NAME or hf/FOLDER"),
    ],
)
def test_an_unknown_encoder_is_refused_with_the_choices(name, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(name)


def test_sides_that_the_patch_does_not_divide_are_refused():
    encoder = load_encoder("timm/vit_tiny_patch16_224", patch_size=14, img_size=70, depth=1)
    with pytest.raises(ValueError, match=r"multiples of the patch size 14"):
        encoder(torch.zeros(1, 3, 64, 70))
