"""Parts of dense prediction: frozen feature maps, heads, sliding windows."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ALONE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pixio import PixioViT
from pixio.dense import DPTHead, FrozenEncoder, LinearHead, SyncedBatchNorm2d, head_blocks, make_head, slide


def tiny_encoder(n_cls_tokens: int = 2) -> PixioViT:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    return PixioViT(**sizes, n_cls_tokens=n_cls_tokens)


# --- features -----------------------------------------------------------------------------------------------


def test_each_location_holds_its_patch_and_the_mean_of_the_class_tokens():
    encoder = tiny_encoder()
    images = torch.randn(2, 3, 32, 48)
    (features,) = FrozenEncoder(encoder, [3])(images)
    (expected,) = encoder(images, [3])
    assert features.shape == (2, 32, 4, 6)
    for row in range(4):
        for column in range(6):
            patch = expected["patch_tokens_norm"][:, row * 6 + column]
            torch.testing.assert_close(features[:, :16, row, column], patch)
            torch.testing.assert_close(features[:, 16:, row, column], expected["cls_tokens_norm"].mean(1))


def test_patch_tokens_alone_can_be_asked_for():
    (features,) = FrozenEncoder(tiny_encoder(n_cls_tokens=0), [3], cls_concat="none")(
        torch.randn(1, 3, 32, 32)
    )
    assert features.shape == (1, 16, 4, 4)


def test_the_mean_of_no_class_tokens_is_refused():
    with pytest.raises(ValueError, match="--cls_concat none"):
        FrozenEncoder(tiny_encoder(n_cls_tokens=0), [3])


def test_only_the_needed_blocks_run_without_gradient_and_in_evaluation_mode():
    encoder = tiny_encoder().train()
    frozen = FrozenEncoder(encoder, [0, 2]).train()
    ran = []
    for number, block in enumerate(encoder.blocks):
        block.register_forward_pre_hook(lambda module, _, number=number: ran.append(number))
    features = frozen(torch.randn(1, 3, 32, 32))
    assert ran == [0, 1, 2]
    assert not any(module.training for module in frozen.modules())
    assert not any(map_.requires_grad for map_ in features)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (32, [7, 15, 23, 31]), (48, [11, 23, 35, 47])],
)
def test_dpt_reads_the_published_blocks_and_linear_the_last(depth, blocks):
    assert head_blocks("dpt", depth) == blocks
    assert head_blocks("linear", depth) == [depth - 1]


def test_dpt_needs_four_blocks():
    with pytest.raises(ValueError, match=r"four blocks, but the encoder has 3"):
        head_blocks("dpt", 3)


# --- heads --------------------------------------------------------------------------------------------------


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_keys_and_shapes_of_a_dpt_head():
    expected = {}
    for level, width in enumerate((256, 512, 1024, 1024)):
        expected |= {f"project.{level}.weight": (width, 40, 1, 1), f"project.{level}.bias": (width,)}
        expected |= {f"reduce.{level}.weight": (256, width, 3, 3)}
        for unit in ("refine", "refine_skip")[: 1 if level == 3 else 2]:
            for conv in ("conv1", "conv2"):
                name = f"fuse.{level}.{unit}.{conv}"
                expected |= {f"{name}.weight": (256, 256, 3, 3), f"{name}.bias": (256,)}
        expected |= {f"fuse.{level}.mix.weight": (256, 256, 1, 1), f"fuse.{level}.mix.bias": (256,)}
    expected |= {"rescale.0.weight": (256, 256, 4, 4), "rescale.0.bias": (256,)}
    expected |= {"rescale.1.weight": (512, 512, 2, 2), "rescale.1.bias": (512,)}
    expected |= {"rescale.3.weight": (1024, 1024, 3, 3), "rescale.3.bias": (1024,)}
    expected |= {"output.0.weight": (256, 256, 3, 3), "output.0.bias": (256,)}
    expected |= {"output.2.weight": (5, 256, 1, 1), "output.2.bias": (5,)}
    assert shapes(DPTHead(40, 5)) == expected


def test_keys_and_shapes_of_a_linear_head():
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = {f"norm.{name}": (40,) for name in norm} | {"norm.num_batches_tracked": ()}
    expected |= {"predict.weight": (5, 40, 1, 1), "predict.bias": (5,)}
    assert shapes(LinearHead(40, 5)) == expected


@torch.no_grad()
@pytest.mark.parametrize("width", [256, 24])
def test_dpt_head_equals_its_description_written_out_with_plain_functions(width):
    torch.manual_seed(0)
    head = DPTHead(8, 2, width)
    maps = [torch.randn(1, 8, 5, 3) for _ in range(4)]
    w = head.state_dict()

    def conv(x, name, **options):
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), **options)

    def refine(x, name):
        return x + conv(F.relu(conv(F.relu(x), f"{name}.conv1", padding=1)), f"{name}.conv2", padding=1)

    def upsample(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    projected = [conv(x, f"project.{level}") for level, x in enumerate(maps)]
    scaled = [
        F.conv_transpose2d(projected[0], w["rescale.0.weight"], w["rescale.0.bias"], stride=4),
        F.conv_transpose2d(projected[1], w["rescale.1.weight"], w["rescale.1.bias"], stride=2),
        projected[2],
        conv(projected[3], "rescale.3", stride=2, padding=1),
    ]
    finest, fine, coarse, coarsest = (conv(x, f"reduce.{i}", padding=1) for i, x in enumerate(scaled))
    x = conv(upsample(refine(coarsest, "fuse.3.refine"), (5, 3)), "fuse.3.mix")
    x = refine(x + refine(coarse, "fuse.2.refine_skip"), "fuse.2.refine")
    x = conv(upsample(x, (10, 6)), "fuse.2.mix")
    x = refine(x + refine(fine, "fuse.1.refine_skip"), "fuse.1.refine")
    x = conv(upsample(x, (20, 12)), "fuse.1.mix")
    x = refine(x + refine(finest, "fuse.0.refine_skip"), "fuse.0.refine")
    x = conv(upsample(x, (40, 24)), "fuse.0.mix")
    x = conv(F.relu(conv(x, "output.0", padding=1)), "output.2")
    torch.testing.assert_close(head(maps, (80, 48)), upsample(x, (80, 48)))


def test_every_parameter_of_a_dpt_head_learns():
    head = DPTHead(8, 2)
    head([torch.randn(1, 8, 4, 4) for _ in range(4)], (16, 16)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("ranks", [None, ALONE])
def test_batchnorm_of_one_rank_is_torchs_batchnorm(ranks):
    torch.manual_seed(0)
    ours, theirs = SyncedBatchNorm2d(6, ranks), nn.BatchNorm2d(6)
    for _ in range(3):
        x = 3 + 2 * torch.randn(4, 6, 5, 7)
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_shared_statistics_pass_the_gradient_of_torchs_batchnorm_on():
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(4, 6, 5, 7)).requires_grad_()
    weights, found = torch.randn(4, 6, 5, 7), []
    for norm in (SyncedBatchNorm2d(6, ALONE), nn.BatchNorm2d(6)):
        (norm(x) * weights).sum().backward()
        found.append([x.grad.clone(), norm.weight.grad, norm.bias.grad, norm.running_var])
        x.grad = None
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_an_unknown_head_names_the_choices():
    with pytest.raises(ValueError, match="unknown head 'mlp': choose one of linear, dpt"):
        make_head("mlp", 8, 3)


def test_heads_are_imported_from_any_folder_and_need_torch_alone(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
from pixio.dense import DPTHead, FrozenEncoder, LinearHead, slide
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new == {"pixio"}, new
assert "pixio.engine" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# --- sliding windows ----------------------------------------------------------------------------------------


def by_the_book(predict, image, size, stride):
    """The windows one by one and pixel by pixel, without shared code."""
    height, width = image.shape[1:]
    sums, counts = {}, {}
    for top in [n * stride for n in range(height) if n * stride < height]:
        for left in [n * stride for n in range(width) if n * stride < width]:
            window = torch.zeros(1, 3, size, size)
            inside = image[:, top : top + size, left : left + size]
            window[0, :, : inside.shape[1], : inside.shape[2]] = inside
            prediction = predict(window)[0]
            for y in range(inside.shape[1]):
                for x in range(inside.shape[2]):
                    place = (top + y, left + x)
                    sums[place] = sums.get(place, 0) + prediction[:, y, x]
                    counts[place] = counts.get(place, 0) + 1
    rows = [[sums[y, x] / counts[y, x] for x in range(width)] for y in range(height)]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)


def mixing(windows: torch.Tensor) -> torch.Tensor:
    """Two outputs that depend on the content of a window and on the place in it."""
    ramp = torch.linspace(0, 1, windows.shape[-1])
    return torch.stack([windows.mean((1, 2, 3))[:, None, None] * ramp * ramp[:, None], windows[:, 1]], 1)


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    size=st.integers(3, 12),
    window_batch=st.integers(1, 9),
)
def test_windows_in_batches_equal_a_naive_loop(height, width, size, window_batch):
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(height * 31 + width))
    stride = int(size * 2 / 3)
    found = slide(mixing, image, size, stride, window_batch)
    torch.testing.assert_close(found, by_the_book(mixing, image, size, stride))


def test_the_number_of_windows_in_a_batch_changes_nothing():
    head = DPTHead(32, 3).eval()
    frozen = FrozenEncoder(tiny_encoder(), [0, 1, 2, 3])
    image = torch.randn(3, 40, 50)
    with torch.inference_mode():
        one, many = (slide(lambda w: head(frozen(w), (32, 32)), image, 32, 21, n) for n in (1, 16))
    torch.testing.assert_close(one, many)


def test_windows_of_the_protocol_start_every_170_pixels():
    seen = []
    slide(lambda w: seen.append(len(w)) or w, torch.zeros(3, 341, 170), 256, int(256 * 2 / 3), 100)
    assert seen == [3]  # rows from 0, 170 and 340, one column


def test_windows_with_gaps_are_refused():
    with pytest.raises(ValueError, match="stride 9, size 8"):
        slide(mixing, torch.zeros(3, 20, 20), 8, 9, 1)
