"""Training some of the encoder: which blocks learn, how fast, in depth and segmentation."""

import shlex

import eval_monodepth
import eval_semseg
import pytest
import timm
import torch
import training_loop
from test_evaluation_runs import TUNED, assert_alike, depth, metrics_of, segmentation, trees  # noqa: F401
from timm.optim import param_groups_layer_decay

import pixio
from benchmarks import few_labels
from pixio.dense import FrozenEncoder, Predictor, TunedEncoder
from pixio.models.external import TimmEncoder, fingerprint
from pixio.models.finetuning import layer_decay_groups, learns, set_training, train_last_blocks
from pixio.synthetic.scenes import render

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2}


def test_layer_decay_groups_are_timms():
    encoder = pixio.PixioViT(**VIT, n_cls_tokens=1)
    theirs = timm.models.VisionTransformer(**VIT, num_classes=3)
    expected = {}
    names = {id(p): name for name, p in theirs.named_parameters()}
    for group in param_groups_layer_decay(
        theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.75, no_opt_scale=None
    ):
        for p in group["params"]:
            expected[names[id(p)]] = (group["weight_decay"], pytest.approx(group["lr_scale"]))
    assert expected.pop("head.weight") == (0.05, 1.0)
    expected.pop("head.bias")
    names = {id(p): name for name, p in encoder.named_parameters()}
    found = {
        names[id(p)]: (group["weight_decay"], group["lr_scale"])
        for group in layer_decay_groups(encoder, 0.05, 0.75)
        for p in group["params"]
    }
    assert found == expected


@pytest.mark.parametrize("count", [0, 2, 5, None])
@pytest.mark.parametrize("kind", ["pixio", "timm"])
def test_the_last_blocks_and_the_final_norm_learn_and_nothing_else(kind, count):
    if kind == "pixio":
        encoder = pixio.PixioViT(**VIT, drop_path=0.5)
    else:
        encoder = TimmEncoder("vit_tiny_patch16_224", depth=5, drop_path_rate=0.5)
    train_last_blocks(encoder, count)
    set_training(encoder, True)
    n = 5 if count is None else count
    assert [learns(block) for block in encoder.blocks] == [False] * (5 - n) + [True] * n
    assert [block.training for block in encoder.blocks] == [False] * (5 - n) + [True] * n
    assert learns(encoder.norm) == (count != 0)
    model = getattr(encoder, "model", encoder)
    assert model.pos_embed.requires_grad == (count is None)
    images = torch.randn(2, 3, *([32, 32] if kind == "pixio" else [64, 64]))
    loss = encoder(images, [4])[0]["patch_tokens_norm"].square().mean()
    assert loss.requires_grad == (count != 0)
    if count != 0:
        loss.backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, name


def test_more_blocks_than_there_are_cannot_learn():
    with pytest.raises(ValueError, match="6 blocks to train: the encoder has 5, choose 0 to 5 or all"):
        train_last_blocks(pixio.PixioViT(**VIT), 6)


def test_maps_of_a_trained_encoder_are_those_of_a_frozen_one():
    encoder = pixio.PixioViT(**VIT, drop_path=0.9)
    images = torch.randn(2, 3, 32, 48)
    frozen = FrozenEncoder(encoder, [1, 4])(images)
    tuned = TunedEncoder(encoder, [1, 4], count=3).eval()(images)
    assert all(torch.equal(a, b) for a, b in zip(frozen, tuned, strict=True))


def test_stochastic_depth_reaches_blocks_that_learn_alone():
    encoder = pixio.PixioViT(**VIT, drop_path=0.9)
    images = torch.randn(8, 3, 32, 32)
    tuned = TunedEncoder(encoder, [1, 4], "none", count=2)
    early, late = tuned.eval()(images)
    same, other = tuned.train()(images)
    assert torch.equal(early, same)
    assert not torch.equal(late, other)


def test_no_blocks_is_the_frozen_run(trees, tmp_path):  # noqa: F811
    frozen = eval_monodepth.main(depth(trees, tmp_path / "a", "--epochs", "1"))
    flags = shlex.split("--epochs 1 --train_blocks 0 --encoder_lr 1 --layer_decay 0.5 --drop_path 0.5")
    zero = eval_monodepth.main(depth(trees, tmp_path / "b", *flags))
    assert metrics_of(zero) == metrics_of(frozen)
    heads = [torch.load(tmp_path / folder / "head.pth")["state"] for folder in "ab"]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not (tmp_path / "b/encoder.pth").exists()


def test_a_trained_encoder_loads_like_a_released_file_and_gives_the_runs_metrics(trees, tmp_path):  # noqa: F811
    flags = [*TUNED, "--drop_path", "0.1"]
    results = eval_semseg.main(segmentation(trees, tmp_path / "tuned", *flags))
    torch.manual_seed(0)
    encoder = pixio.create_model("pixio_vitpico16")
    assert results["encoder_sha256"] == fingerprint(encoder)
    before, after = (e.state_dict() for e in (encoder, pixio.pixio_vitpico16(tmp_path / "tuned/encoder.pth")))
    changed = {".".join(key.split(".")[:2]) for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"blocks.4", "blocks.5", "norm.weight", "norm.bias"}
    weights = ["--pretrained_ckp", str(tmp_path / "tuned/encoder.pth")]
    head = ["--head", str(tmp_path / "tuned/head.pth"), "--eval_only"]
    again = eval_semseg.main(segmentation(trees, tmp_path / "again", *weights, *head))
    assert_alike(again, results | {"evaluations": results["evaluations"][-1:]}, rel=1e-6, abs=0)
    mask = Predictor.from_pretrained(tmp_path / "tuned/head.pth")(render(3, (40, 40)).image)
    assert mask.shape == (40, 40)


@pytest.mark.slow
def test_the_benchmark_of_few_labels_runs_and_does_not_compute_twice(tmp_path, monkeypatch):
    tiny = f"--output {tmp_path} --labels 2 --seeds 1 --lr 1e-3 --steps 1 --val 1 --size 32 --device cpu"
    torch.save(pixio.create_model("pixio_vitfemto8", img_size=32).state_dict(), tmp_path / "weights.pth")
    tiny += f" --encoder pixio_vitfemto8 --pretrained {tmp_path / 'weights.pth'}"
    table = few_labels.main(tiny.split())
    assert {side: list(points) for side, points in table.items()} == {"pre-trained": [2], "from scratch": [2]}
    assert all(0 <= miou <= 100 for points in table.values() for miou in points[2])
    assert (tmp_path / "few_labels.png").is_file()
    monkeypatch.setattr(training_loop, "accumulate", None)
    assert few_labels.main(tiny.split()) == table
