"""What dense evaluation computes: frozen features, heads, windows, losses, metrics, learning rates."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monodepth.metrics import METRICS, DepthScores, silog_loss
from semseg.metrics import SegmentationScores, segmentation_loss
from torch import nn

from pixio import PixioViT
from pixio.dense.frozen import FrozenEncoder
from pixio.dense.heads import DPTHead, LinearHead, SyncedBatchNorm2d, head_blocks
from pixio.dense.sliding import slide
from pixio.engine.runtime import Runtime
from pixio.engine.schedule import poly

ALONE = Runtime(torch.device("cpu"))


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
    assert shapes(LinearHead(40, 5, ALONE)) == expected


@torch.no_grad()
def test_dpt_head_equals_its_description_written_out_with_plain_functions():
    torch.manual_seed(0)
    head = DPTHead(8, 2)
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


def test_synced_batchnorm_alone_is_torchs_batchnorm():
    torch.manual_seed(0)
    ours, theirs = SyncedBatchNorm2d(6, ALONE), nn.BatchNorm2d(6)
    for _ in range(3):
        x = 3 + 2 * torch.randn(4, 6, 5, 7)
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


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


# --- depth: loss and metrics --------------------------------------------------------------------------------


def test_silog_loss_equals_its_formula_in_float64():
    rng = np.random.default_rng(0)
    prediction, target = rng.uniform(0.2, 9, (2, 3, 4, 5))
    target[0, :2] = 0
    target[1, 0] = 50  # beyond the farthest depth
    prediction[2, 0, 0] = 0  # raised to the nearest depth
    differences = []
    for p, t in zip(prediction.ravel(), target.ravel(), strict=True):
        if 0.1 <= t <= 10:
            differences.append(math.log(t) - math.log(max(p, 0.1)))
    mean_square = sum(d * d for d in differences) / len(differences)
    mean = sum(differences) / len(differences)
    tensors = (torch.tensor(x, dtype=torch.float32) for x in (prediction, target))
    loss = silog_loss(*tensors, 0.1, 10)
    assert loss.item() == pytest.approx(math.sqrt(mean_square - 0.5 * mean * mean), rel=1e-5)


@pytest.mark.parametrize("target", [torch.zeros(1, 4, 4), torch.full((1, 4, 4), 2.0)])
def test_silog_loss_has_a_finite_gradient_without_measured_pixels_and_without_error(target):
    prediction = torch.full((1, 4, 4), 2.0, requires_grad=True)
    loss = silog_loss(prediction, target, 0.1, 10)
    loss.backward()
    assert loss.item() < 1e-5
    assert prediction.grad.abs().max() == 0


def nine_metrics(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The published metrics of one image in float64, pixel by pixel."""
    pairs = [(float(p), float(t)) for p, t in zip(prediction.ravel(), target.ravel(), strict=True)]
    pairs = [(min(max(p, 0.5), 8.0), t) for p, t in pairs if 0.5 <= t <= 8.0]
    logs = [math.log(p / t) for p, t in pairs]
    n = len(pairs)
    within = {f"d{k}": 100 * sum(max(p / t, t / p) < 1.25**k for p, t in pairs) / n for k in (1, 2, 3)}
    return within | {
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
        "sq_rel": sum((p - t) ** 2 / t for p, t in pairs) / n,
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n),
        "rmse_log": math.sqrt(sum(x * x for x in logs) / n),
        "log10": sum(abs(x) / math.log(10) for x in logs) / n,
        "silog": math.sqrt(sum(x * x for x in logs) / n - 0.5 * (sum(logs) / n) ** 2),
    }


def depth_images(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [(rng.uniform(0, 9, (6, 7)), rng.uniform(0, 9, (6, 7))) for _ in range(count)]


def depth_scores(images, indices) -> DepthScores:
    scores = DepthScores(0.5, 8.0)
    for index in indices:
        prediction, target = (torch.tensor(x) for x in images[index])
        scores.add(index, prediction, target)
    return scores


def test_depth_metrics_are_means_over_images_of_their_float64_values():
    images = depth_images(4)
    found = DepthScores.summarize([depth_scores(images, range(4)).state])
    rows = [nine_metrics(*image) for image in images]
    expected = {name: sum(row[name] for row in rows) / 4 for name in METRICS}
    assert {name: found[name] for name in METRICS} == pytest.approx(expected, rel=1e-9)
    assert (found["images"], found["skipped"]) == (4, 0)


def test_depth_metrics_do_not_depend_on_the_number_of_ranks():
    images = depth_images(5)
    alone = depth_scores(images, range(5))
    two = [depth_scores(images, range(rank, 5, 2)).state for rank in (0, 1)]
    assert DepthScores.summarize([alone.state]) == DepthScores.summarize(two)


def test_images_with_fewer_than_ten_measured_pixels_are_skipped():
    (prediction, target), full = depth_images(2)
    for pixels, skipped in ((9, 1), (10, 0)):
        sparse = np.zeros_like(target)
        sparse.ravel()[:pixels] = 2.0
        found = DepthScores.summarize([depth_scores([(prediction, sparse), full], (0, 1)).state])
        assert (found["images"], found["skipped"]) == (2 - skipped, skipped)


def test_depth_without_any_measured_pixel_is_an_error():
    with pytest.raises(ValueError, match="none of the 1 images"):
        DepthScores.summarize([depth_scores([(np.ones((6, 7)), np.zeros((6, 7)))], [0]).state])


# --- segmentation: loss and metric --------------------------------------------------------------------------


def test_segmentation_loss_is_the_mean_over_the_scored_pixels():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 5, 6, 7), torch.randint(0, 5, (2, 6, 7), dtype=torch.uint8)
    mask[0, :3] = 255
    expected = F.cross_entropy(logits.double(), mask.long(), ignore_index=255)
    assert segmentation_loss(logits, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert segmentation_loss(logits, torch.full_like(mask, 255)).item() == 0


def predictions_and_masks(nclass: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images = []
    for side in (5, 8, 13):
        mask = torch.randint(0, nclass - 1, (side, side), generator=generator, dtype=torch.uint8)
        mask[torch.rand(side, side, generator=generator) < 0.2] = 255
        images.append((torch.randint(0, nclass, (side, side), generator=generator), mask))
    return images


def test_miou_equals_scikit_learns():
    from sklearn.metrics import jaccard_score

    nclass = 6
    scores = SegmentationScores(nclass)
    truth, predicted = [], []
    for index, (prediction, mask) in enumerate(predictions_and_masks(nclass)):
        scores.add(index, prediction, mask)
        truth += mask[mask != 255].tolist()
        predicted += prediction[mask != 255].tolist()
    found = scores.summarize([scores.state])
    expected = jaccard_score(truth, predicted, labels=range(nclass), average=None)
    assert found["iou"] == pytest.approx((100 * expected).tolist(), rel=1e-12)
    assert found["miou"] == pytest.approx(100 * expected.mean(), rel=1e-12)
    assert found["images"] == 3


def test_miou_does_not_depend_on_the_number_of_ranks():
    images = predictions_and_masks(4)

    def state(indices):
        scores = SegmentationScores(4)
        for index in indices:
            scores.add(index, *images[index])
        return scores.state

    assert SegmentationScores.summarize([state((0, 1, 2))]) == SegmentationScores.summarize(
        [state((0, 2)), state((1,))]
    )


def test_a_class_that_never_occurs_has_no_share_in_the_mean():
    scores = SegmentationScores(3)
    mask = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)
    scores.add(0, torch.tensor([[0, 1], [0, 1]]), mask)
    found = scores.summarize([scores.state])
    assert found["iou"] == pytest.approx([50.0, 200 / 3, None])
    assert found["miou"] == pytest.approx((50 + 200 / 3) / 2)


def test_masks_without_any_scored_pixel_are_an_error():
    scores = SegmentationScores(3)
    scores.add(0, torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match="nothing to score"):
        scores.summarize([scores.state])


# --- learning rate ------------------------------------------------------------------------------------------


def test_poly_rises_linearly_then_falls_with_the_power_of_what_is_left():
    rates = [poly(step, 2.0, 10, 110) for step in range(111)]
    assert rates[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert rates[10:] == pytest.approx([2.0 * (1 - step / 100) ** 0.9 for step in range(101)])


def test_poly_without_warmup_is_the_textbook_schedule():
    schedule = torch.optim.lr_scheduler.PolynomialLR
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = schedule(optimizer, total_iters=20, power=0.9)
    for step in range(21):
        assert poly(step, 0.3, 0, 20) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_poly_stays_at_zero_after_the_end_and_refuses_a_warmup_longer_than_the_run():
    assert poly(25, 0.3, 0, 20) == 0
    with pytest.raises(ValueError, match="warm-up of 21 steps"):
        poly(0, 0.3, 21, 20)
