"""The masked autoencoder: loss against a plain re-computation, gradients, initialization, decoder."""

import numpy as np
import pytest
import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

import pixio
from pixio import PixioMAE, PixioViT
from pixio.models.layers import sincos_positions
from pixio.models.mae import patchify, unpatchify


def small_mae(**options) -> PixioMAE:
    torch.manual_seed(0)
    encoder = PixioViT(
        img_size=64, embed_dim=48, depth=2, num_heads=3, n_cls_tokens=options.pop("n_cls_tokens", 3)
    )
    return PixioMAE(
        encoder, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2, mask_grid=2, **options
    )


def loss_in_float64(images, pred, mask, p, normalize):
    """Patch by patch, in plain numpy loops."""
    images, pred, mask = (x.detach().double().numpy() for x in (images, pred, mask))
    errors, columns = [], images.shape[3] // p
    for b, n in zip(*np.nonzero(mask), strict=True):
        i, j = divmod(n, columns)
        patch = images[b, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
        target = np.array([patch[k, r, c] for r in range(p) for c in range(p) for k in range(patch.shape[0])])
        if normalize:
            target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
        errors.append(((pred[b, n] - target) ** 2).mean())
    return np.mean(errors)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_loss_equals_a_float64_recomputation(normalize, size):
    mae = small_mae(norm_pix_loss=normalize)
    images = torch.randn(3, 3, *size) * 2 + 0.5
    out = mae(images, mask_ratio=0.5)
    expected = loss_in_float64(images, out.pred, out.mask, 16, normalize)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    assert out.mask.sum(dim=1).tolist() == [size[0] * size[1] / 512] * 3


def test_gradients_reach_every_parameter():
    mae = small_mae()
    mae(torch.randn(2, 3, 64, 64)).loss.backward()
    for name, parameter in mae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_masked_pixels_do_not_influence_the_prediction():
    mae = small_mae().eval()
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 4)
    out = mae(images, noise=noise)
    hidden = unpatchify(out.mask.unsqueeze(-1).expand(-1, -1, 768), 16, (4, 4)) == 1
    again = mae(torch.where(hidden, torch.randn_like(images), images), noise=noise)
    assert torch.equal(out.pred, again.pred)
    assert torch.equal(out.mask, again.mask)


def test_class_tokens_reach_the_decoder():
    mae = small_mae().eval()
    images, noise = torch.randn(1, 3, 64, 64), torch.rand(1, 4)
    before = mae(images, noise=noise).pred
    with torch.no_grad():
        mae.decoder_pos_embed[:, :3] += 1
    assert not torch.allclose(before, mae(images, noise=noise).pred)


def test_decoder_is_equivariant_to_the_order_of_visible_patches():
    mae = small_mae().eval()
    torch.manual_seed(1)
    cls_tokens, visible = torch.randn(1, 3, 48), torch.randn(1, 5, 48)
    place = torch.randperm(16)  # place[n] = position of patch n once the visible ones are in front
    shuffle = torch.randperm(5)
    moved = torch.tensor([int((shuffle == p).nonzero()) if p < 5 else p for p in place.tolist()])
    first = mae.decode(cls_tokens, visible, place[None], (4, 4))
    second = mae.decode(cls_tokens, visible[:, shuffle], moved[None], (4, 4))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_extreme_ratios_give_finite_losses(ratio):
    out = small_mae()(torch.randn(2, 3, 64, 64), mask_ratio=ratio)
    assert torch.isfinite(out.loss)
    assert out.mask.eq(ratio).all()
    assert (out.loss == 0) == (ratio == 0)


def test_patch_vectors_are_row_column_channel_and_the_inverse_is_exact():
    images = torch.arange(2 * 3 * 32 * 48.0).view(2, 3, 32, 48)
    patches = patchify(images, 16)
    assert patches.shape == (2, 6, 768)
    assert patches[1, 4, (5 * 16 + 7) * 3 + 2] == images[1, 2, 16 + 5, 16 + 7]
    assert torch.equal(unpatchify(patches, 16, (2, 3)), images)


def test_the_decoder_is_initialized_like_the_encoder():
    torch.manual_seed(0)
    mae = pixio.pixio_vits16_enc384x12h6_dec256x4h8()
    layers = [
        mae.decoder_embed,
        mae.decoder_pred,
        *(m for b in mae.decoder_blocks for m in (b.attn.qkv, b.mlp.fc1)),
    ]
    for layer in layers:
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert layer.bias.eq(0).all()
    assert mae.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert mae.decoder_pos_embed.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(("name", "millions"), [("h", 102.06), ("5b", 102.98)])
def test_published_decoders_have_the_stated_size(name, millions):
    full = next(m for m in pixio.list_models(pretraining=True) if m.startswith(f"pixio_vit{name}16"))
    with torch.device("meta"):
        mae = pixio.create_model(full)
    decoder = sum(p.numel() for n, p in mae.named_parameters() if not n.startswith("encoder."))
    assert round(decoder / 1e6, 2) == millions


def test_every_encoder_has_a_pretraining_model_that_tells_the_truth():
    for encoder, name in zip(pixio.list_models(), pixio.list_models(pretraining=True), strict=True):
        with torch.device("meta"):
            mae = pixio.create_model(name)
        e, d = mae.encoder, mae.decoder_blocks
        assert name == (
            f"{encoder}_enc{e.embed_dim}x{len(e.blocks)}h{e.num_heads}"
            f"_dec{mae.decoder_embed.out_features}x{len(d)}h{d[0].attn.num_heads}"
        )


def test_a_mask_grid_that_does_not_fit_the_image_is_refused():
    with pytest.raises(ValueError, match="mask_grid 4 does not divide the patch grid 14 x 14"):
        PixioMAE(PixioViT(img_size=224, embed_dim=48, depth=1, num_heads=3))


@pytest.mark.parametrize("rows", [1, 3])
def test_noise_for_another_number_of_images_is_refused(rows):
    with pytest.raises(ValueError, match=f"noise for {rows} images, but there are 2"):
        small_mae()(torch.zeros(2, 3, 64, 64), noise=torch.rand(rows, 4))


def test_loss_stays_float32_under_bf16_autocast():
    mae = small_mae()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mae(torch.randn(2, 3, 64, 64))
    assert out.loss.dtype == torch.float32


def test_unknown_models_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"did you mean pixio_vith16\?.*pixio_vit5b16"):
        pixio.create_model("pixio_vith14")


def test_sine_cosine_positions_are_those_of_timm_and_leave_the_class_tokens_alone():
    mae = small_mae()
    before = mae.encoder.pos_embed[:, :3].clone()
    mae.start_from_sincos()
    for positions, width in ((mae.encoder.pos_embed, 48), (mae.decoder_pos_embed, 32)):
        sin_y, sin_x, cos_y, cos_x = build_sincos2d_pos_embed([4, 4], width).chunk(4, dim=1)
        expected = torch.cat([sin_x, cos_x, sin_y, cos_y], dim=1)  # MAE's order
        torch.testing.assert_close(positions[0, 3:].detach(), expected)
        assert positions.requires_grad
    assert torch.equal(mae.encoder.pos_embed[:, :3], before)
    with pytest.raises(ValueError, match="multiple of 4, found 6"):
        sincos_positions((2, 2), 6)
