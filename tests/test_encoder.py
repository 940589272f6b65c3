"""The encoder: sizes, initialization, the features contract, and two independent oracles."""

import functools

import pytest
import timm
import timm.optim
import torch
from timm.models.vision_transformer import VisionTransformer
from transformers import PixioConfig, PixioModel

import pixio
from pixio import PixioViT
from pixio.models.layers import images_to_keep, stochastic_depth

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3, "n_cls_tokens": 3}


def random_encoder(**options) -> PixioViT:
    """An encoder whose biases and norms are random too, so that nothing is compared at a neutral value."""
    torch.manual_seed(0)
    model = PixioViT(**{**SMALL, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("pixio_vitb16", 85_855_488),
        ("pixio_vitl16", 303_377_408),
        ("pixio_vith16", 631_013_120),
        ("pixio_vit1b16", 1_361_515_008),
        ("pixio_vit5b16", 5_440_939_008),
    ],
)
def test_released_sizes_have_the_published_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in pixio.create_model(name).parameters()) == count


def test_released_keys_are_exactly_these():
    block = [
        *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
        *("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"),
        *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    ]
    expected = {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
    }
    expected |= {f"blocks.{i}.{key}" for i in range(4) for key in block}
    assert set(PixioViT(**SMALL).state_dict()) == expected


def xavier_bound(weight: torch.Tensor) -> float:
    rows = weight.flatten(1)
    return (6 / (rows.shape[0] + rows.shape[1])) ** 0.5


def test_initialization_has_the_stated_statistics():
    torch.manual_seed(0)
    model = pixio.pixio_vits16()
    weights = [model.patch_embed.proj.weight] + [
        w
        for b in model.blocks
        for w in (b.attn.qkv.weight, b.attn.proj.weight, b.mlp.fc1.weight, b.mlp.fc2.weight)
    ]
    for weight in weights:
        bound = xavier_bound(weight)
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and name != "patch_embed.proj.bias":
            assert parameter.eq(0).all(), name
        if "norm" in name and name.endswith("weight"):
            assert parameter.eq(1).all(), name
    bias, bound = model.patch_embed.proj.bias, 768**-0.5  # torch's default of Conv2d, as in MAE
    assert bias.abs().max() <= bound
    assert bias.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)


def transformers_twin(model: PixioViT) -> PixioModel:
    """The same weights in transformers' PixioModel."""
    config = PixioConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.num_heads,
        image_size=model.img_size[0],
        patch_size=model.patch_size,
        n_cls_tokens=model.n_cls_tokens,
    )
    twin = PixioModel(config).eval()
    source, state = model.state_dict(), twin.state_dict()
    renamed = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "layernorm": "norm",
        "layers": "blocks",
    }
    for key in state:
        ours = key
        for theirs, own in renamed.items():
            ours = ours.replace(theirs, own)
        for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
            if f"attention.{part}" in ours:
                state[key] = source[ours.replace(f"attention.{part}", "attn.qkv")].chunk(3)[i]
                break
        else:
            state[key] = source[ours]
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (128, 32), (112, 176)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"embed_dim": 64, "depth": 6, "num_heads": 4, "n_cls_tokens": 8},
        {"n_cls_tokens": 1, "img_size": 96},
    ],
)
@torch.inference_mode()
def test_every_block_equals_the_transformers_model(size, options):
    model = random_encoder(**options)
    images = torch.randn(2, 3, *size)
    expected = transformers_twin(model)(images, output_hidden_states=True)
    features = model(images)
    assert len(features) == len(model.blocks) == len(expected.hidden_states) - 1
    for ours, theirs in zip(features, expected.hidden_states[1:], strict=True):
        tokens = torch.cat([ours["cls_tokens"], ours["patch_tokens"]], dim=1)
        torch.testing.assert_close(tokens, theirs, atol=1e-5, rtol=0)
    last = torch.cat([features[-1]["cls_tokens_norm"], features[-1]["patch_tokens_norm"]], dim=1)
    torch.testing.assert_close(last, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        features[-1]["cls_tokens_norm"].mean(dim=1), expected.pooler_output, atol=1e-5, rtol=0
    )


@torch.inference_mode()
def test_timm_vit_with_registers_gives_the_same_features():
    model = random_encoder(n_cls_tokens=8)
    twin = VisionTransformer(
        img_size=64,
        patch_size=16,
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=0,
        reg_tokens=7,
        global_pool="",
    )
    state = model.state_dict()
    tokens = state.pop("cls_token") + state["pos_embed"][:, :8]
    state["cls_token"], state["reg_token"] = tokens[:, :1], tokens[:, 1:]
    state["pos_embed"] = torch.cat([torch.zeros(1, 8, 48), state["pos_embed"][:, 8:]], dim=1)
    twin.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 64, 64)
    ours = model(images, block_ids=[-1])[0]
    tokens = torch.cat([ours["cls_tokens_norm"], ours["patch_tokens_norm"]], dim=1)
    torch.testing.assert_close(tokens, twin.eval().forward_features(images), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_block_ids_are_honoured_in_the_order_asked():
    model = random_encoder()
    images = torch.randn(1, 3, 64, 64)
    every = model(images)
    for ids in ([0], [-1], [2, 0], [-1, 1], []):
        chosen = model(images, block_ids=ids)
        assert len(chosen) == len(ids)
        for features, i in zip(chosen, ids, strict=True):
            for key, value in features.items():
                assert torch.equal(value, every[i][key])


@torch.inference_mode()
def test_forward_stops_after_the_last_block_wanted_and_norms_only_what_is_asked():
    model = random_encoder()
    calls = []
    model.norm.register_forward_hook(lambda *_: calls.append("norm"))
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    model(torch.randn(1, 3, 64, 64), block_ids=[2, 0])
    assert calls == [0, "norm", 1, 2, "norm"]


def test_unknown_block_is_refused_with_the_range():
    with pytest.raises(ValueError, match=r"\[4\].*4 blocks.*-4 to 3"):
        random_encoder()(torch.zeros(1, 3, 64, 64), block_ids=[4])


@pytest.mark.parametrize("size", [(64, 70), (8, 64), (0, 64)])
def test_sizes_the_patch_does_not_divide_are_refused_with_a_remedy(size):
    with pytest.raises(ValueError, match=r"multiples of the patch size 16.*e\.g\. to"):
        random_encoder()(torch.zeros(1, 3, *size))


def test_one_image_is_a_batch_of_one():
    encoder, image = random_encoder(), torch.randn(3, 64, 64)
    one, batch = encoder.forward_features(image), encoder.forward_features(image[None])
    assert all(torch.equal(one[name], batch[name]) for name in batch)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (4, 64, 64), (64, 64), (2, 1, 3, 64, 64)])
def test_wrong_image_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"):
        random_encoder()(torch.zeros(shape))


@torch.inference_mode()
def test_other_patch_sizes_image_sizes_and_channels_work():
    model = PixioViT(img_size=(56, 28), patch_size=14, in_chans=5, embed_dim=32, depth=1, num_heads=2)
    assert model.pos_embed.shape == (1, 8 + 4 * 2, 32)
    features = model(torch.randn(2, 5, 28, 70))[0]
    assert features["patch_tokens"].shape == (2, 2 * 5, 32)
    assert features["cls_tokens_norm"].shape == (2, 8, 32)


@torch.inference_mode()
def test_keeping_all_patches_in_another_order_only_permutes_the_patch_tokens():
    model = random_encoder()
    images = torch.randn(2, 3, 64, 96)
    order = torch.stack([torch.randperm(24) for _ in range(2)])
    whole, permuted = model(images, [-1])[0], model(images, [-1], ids_keep=order)[0]
    torch.testing.assert_close(permuted["cls_tokens"], whole["cls_tokens"])
    expected = whole["patch_tokens"].gather(1, order.unsqueeze(-1).expand(-1, -1, 48))
    torch.testing.assert_close(permuted["patch_tokens"], expected)


def test_stochastic_depth_grows_linearly_and_keeps_the_mean():
    torch.manual_seed(0)
    scales = stochastic_depth(0.4, 5, 20_000, torch.device("cpu"))
    dropped = (scales == 0).float().mean(2)
    torch.testing.assert_close(dropped, torch.linspace(0, 0.4, 5).repeat(2, 1).T, atol=0.01, rtol=0)
    torch.testing.assert_close(scales.mean(2), torch.ones(5, 2), atol=0.03, rtol=0)
    assert scales[-1].unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert (stochastic_depth(0.4, 1, 8, torch.device("cpu")) == 1).all()


def test_a_dropped_branch_leaves_its_image_as_it_is():
    model, x = random_encoder(), torch.randn(3, 5, 48)
    block, scales = model.blocks[0], torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    out = block(x, scales)
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out[1], x[1] + 2 * block.attn(block.norm1(x))[1])
    torch.testing.assert_close(out[2], block(x)[2])


def test_skipped_images_are_as_many_as_the_rate_says_and_the_mean_is_kept():
    torch.manual_seed(0)
    draws = [images_to_keep(0.4, 5, 20, torch.device("cpu")) for _ in range(400)]
    assert draws[0][0] is None
    assert [ids.shape for ids in draws[0][1:]] == [(2, count) for count in (18, 16, 14, 12)]
    assert all(len(set(row.tolist())) == 12 for row in draws[0][-1])
    kept = torch.stack([draw[-1] for draw in draws]).flatten().bincount(minlength=20) / (2 * len(draws))
    torch.testing.assert_close(kept, torch.full((20,), 0.6), atol=0.08, rtol=0)


def test_a_skipped_branch_is_that_of_a_scaled_one():
    model, x = random_encoder(), torch.randn(4, 5, 48)
    block, ids = model.blocks[0], torch.tensor([[2, 0], [3, 1]])
    scales = torch.tensor([[2.0, 0.0, 2.0, 0.0], [0.0, 2.0, 0.0, 2.0]])
    torch.testing.assert_close(block(x, ids=ids), block(x, scales))


def test_a_mode_of_stochastic_depth_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="unknown drop_path_mode 'drop': choose exact or skip"):
        PixioViT(**SMALL, drop_path_mode="drop")


def test_stochastic_depth_is_of_training_alone():
    model, images = PixioViT(**SMALL, drop_path=0.9), torch.randn(4, 3, 32, 32)
    once, again = (model(images)[-1]["patch_tokens"] for _ in range(2))
    assert not torch.equal(once, again)
    once, again = (model.eval()(images)[-1]["patch_tokens"] for _ in range(2))
    assert torch.equal(once, again)


def test_the_patch_projection_has_the_attributes_of_the_released_model():
    embed = pixio.PixioViT(**SMALL | {"img_size": (64, 96), "patch_size": 16}).patch_embed
    assert (embed.patch_size, embed.img_size, embed.grid_size) == ((16, 16), (64, 96), (4, 6))
    assert embed.num_patches == 24


def test_norm_layer_is_accepted_where_it_is_the_one_of_the_weights():
    norm_layer = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    assert pixio.pixio_vitfemto16(norm_layer=norm_layer).norm.eps == 1e-6
    for other in (torch.nn.LayerNorm, torch.nn.BatchNorm1d, functools.partial(norm_layer, bias=False)):
        with pytest.raises(ValueError, match=r"norm_layer gives .*trained with LayerNorm.*eps=1e-06"):
            pixio.pixio_vitfemto16(norm_layer=other)


def test_no_block_asked_for_is_no_features():
    assert random_encoder()(torch.randn(1, 3, 64, 64), block_ids=[]) == []


def test_timms_layer_decay_groups_the_parameters_as_those_of_its_own_vit():
    layer_decay = timm.optim.param_groups_layer_decay
    scales = {}
    for model in (pixio.pixio_vitti16(), timm.create_model("vit_tiny_patch16_224", num_classes=0)):
        names_of = {parameter: name for name, parameter in model.named_parameters()}
        groups = layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75)
        scales[type(model)] = {
            names_of[parameter]: (group["lr_scale"], group["weight_decay"])
            for group in groups
            for parameter in group["params"]
        }
    ours, theirs = scales.values()
    assert ours == theirs
    assert len({scale for scale, _ in ours.values()}) == 13


@pytest.mark.parametrize("switch", ["set_grad_checkpointing", "gradient_checkpointing_enable"])
def test_activation_checkpointing_is_switched_on_by_the_fields_names(switch):
    model, images = random_encoder().train(), torch.randn(2, 3, 64, 64)
    model(images, [-1])[0]["cls_tokens_norm"].square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    getattr(model, switch)()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(images, [-1])[0]["cls_tokens_norm"].square().mean().backward()
    assert len(calls) == 2  # forward, and again in the backward pass
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


def test_encoder_compiles_without_graph_breaks():
    model = random_encoder(depth=2)
    images = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(lambda x: model(x, block_ids=[0, -1]), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(images), model(images, block_ids=[0, -1]), strict=True):
        torch.testing.assert_close(ours["patch_tokens_norm"], theirs["patch_tokens_norm"])
