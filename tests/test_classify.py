"""Classification: probes against other people's arithmetic, data, runs that resume, and runs on two ranks."""

import os
import random
import sys
from pathlib import Path

import eval_classify
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_loop
from classify.data import open_images, seeded
from classify.heads import AttentiveProbe, LinearProbe
from eval_classify import ClassifyConfig, mixing
from helpers import ALONE, Killed, free_port, read_log, run_two_ranks, write_tar
from image_sets import encoded
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

import pixio
from pixio.synthetic.scenes import render

TINY = """
    --encoder pixio_vitpico16 --input_size 32 --device cpu --dtype fp32 --num_workers 0 --save_minutes 0
    --batch_size 2 --batches_per_step 2 --epochs 2 --warmup_epochs 1 --lr 1e-3
"""
TUNED = ("--train_blocks", "2", "--drop_path", "0", "--probe", "linear")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Two classes with four and three images in training and two in validation, of different sizes."""
    root = tmp_path_factory.mktemp("classes")
    for split, counts in (("train", (4, 3)), ("val", (2, 2))):
        for number, (name, count) in enumerate(zip(("cat", "dog"), counts, strict=True)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                scene = render(100 * number + 10 * (split == "val") + i, (36 + i, 44))
                Image.fromarray(scene.image).save(root / split / name / f"{i}.png")
    return root


def flags(data: Path, output: Path, *more: str) -> list[str]:
    return [*TINY.split(), "--data_path", str(data), "--output_dir", str(output), *more]


def metrics_of(results: dict) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in results["evaluations"]]


@pytest.fixture(scope="module")
def tuned(folders, tmp_path_factory) -> tuple[dict, Path]:
    """A finished run that trained two blocks."""
    output = tmp_path_factory.mktemp("tuned")
    return eval_classify.main(flags(folders, output, *TUNED)), output


# --- probes -------------------------------------------------------------------------------------------------


def test_a_linear_probe_converges_to_scikit_learns_logistic_regression():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    x = rng.normal(0, 1, (90, 5)) * [1, 10, 0.1, 3, 1] + labels[:, None] * [1, 0, 0.1, -2, 0] + 7
    standard = StandardScaler().fit_transform(x)
    theirs = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(standard, labels)
    probe, target = LinearProbe(5, 3, ALONE), torch.from_numpy(labels)
    features = {"cls_tokens_norm": torch.from_numpy(x).float()[:, None].repeat(1, 4, 1)}
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = probe.predict.weight.square().sum() / (2 * 0.5 * len(labels))
        value = F.cross_entropy(probe(features), target) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    probabilities = probe(features).softmax(1).detach().numpy()
    np.testing.assert_allclose(probabilities, theirs.predict_proba(standard), atol=2e-3)


def test_an_attentive_probe_is_attention_of_one_query_over_all_tokens():
    torch.manual_seed(0)
    probe = AttentiveProbe(128, 3)
    nn.init.normal_(probe.pool.latent)
    cls, patches = torch.randn(2, 8, 128), torch.randn(2, 9, 128)
    found = probe({"cls_tokens_norm": cls, "patch_tokens_norm": patches})
    w = {name: value.detach().double().numpy() for name, value in probe.state_dict().items()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    tokens = torch.cat([cls, patches], 1).double().numpy()
    query = linear(w["pool.latent"][0, 0], "pool.q").reshape(2, 64)  # two heads
    keys, values = np.split(linear(tokens, "pool.kv"), 2, axis=-1)
    scores = np.einsum("hd,bthd->bht", query, keys.reshape(2, 17, 2, 64)) / 8
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    pooled = np.einsum("bht,bthd->bhd", weights, values.reshape(2, 17, 2, 64)).reshape(2, 128)
    x = linear(pooled, "pool.proj")
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    hidden = torch.from_numpy(linear(normed * w["pool.norm.weight"] + w["pool.norm.bias"], "pool.mlp.fc1"))
    x = x + linear(F.gelu(hidden).numpy(), "pool.mlp.fc2")
    np.testing.assert_allclose(found.detach().numpy(), linear(x, "predict"), rtol=1e-4, atol=1e-5)


def test_probes_without_class_tokens_use_the_patches():
    features = {"cls_tokens_norm": torch.zeros(4, 0, 6), "patch_tokens_norm": torch.randn(4, 9, 6)}
    same = {"cls_tokens_norm": features["patch_tokens_norm"]}
    probe = LinearProbe(6, 2, ALONE)
    assert torch.equal(probe(features), probe(same))


# --- data ---------------------------------------------------------------------------------------------------


def test_tars_hold_the_same_images_as_folders(folders, tmp_path):
    expected = open_images(folders, "train")
    members = {}
    for i in range(len(expected)):
        members[f"{i:03d}.png"] = encoded(expected.read(i), "PNG")
        members[f"{i:03d}.cls"] = str(int(expected.labels[i])).encode()
    write_tar(tmp_path / "set-train-0000.tar", dict(list(members.items())[:6]))
    write_tar(tmp_path / "set-train-0001.tar", dict(list(members.items())[6:]))
    (tmp_path / "._set-train-0000.tar").write_bytes(b"what macOS keeps beside a file")
    found = open_images(tmp_path, "train")
    assert found.labels.tolist() == expected.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    for i in range(len(expected)):
        np.testing.assert_array_equal(found.read(i), expected.read(i))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x"}, "no tar of labeled images"),
        ({"a.png": b"x", "b.cls": b"0"}, r"has a\.png, but no a\.cls"),
        ({"a.png": b"x", "a.cls": b"cat"}, "no tar of labeled images"),
        ({"a.png": b"x", "a.cls": b"5"}, "has class 5, training has 0-1"),
        ({"a.png": b"x", "a.cls": b"1", "b.png": b"x", "b.cls": b"-1"}, "has class -1, training has 0-1"),
    ],
)
def test_tars_without_usable_classes_are_errors(tmp_path, members, message):
    write_tar(tmp_path / "my-val.tar", members)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path, "val", ["cat", "dog"])


def test_an_unreadable_image_ends_the_run_with_its_name(folders, tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "a.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"train/(cat|dog)/a\.png is not a readable image"):
        eval_classify.main(flags(tmp_path, tmp_path / "run"))


def test_seeded_numbers_repeat_and_leave_no_trace():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    undisturbed = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    with seeded(3, 4):
        first = draw()
    assert draw() == undisturbed
    with seeded(3, 4):
        assert draw() == first


def test_frozen_encoders_get_plain_targets_and_trained_ones_mixed_smoothed_ones():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
    same, plain = mixing(ClassifyConfig(), 3)(images.clone(), labels)
    assert torch.equal(same, images)
    assert torch.equal(plain, F.one_hot(labels, 3).float())
    mixed, soft = mixing(ClassifyConfig(train_blocks="1"), 3)(images.clone(), labels)
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    assert soft.min() >= 0.1 / 3 - 1e-6


# --- runs ---------------------------------------------------------------------------------------------------


def test_no_blocks_is_the_frozen_run_and_the_encoder_stays(folders, tmp_path):
    frozen = eval_classify.main(flags(folders, tmp_path / "a", "--probe", "attentive"))
    more = "--probe attentive --train_blocks 0 --encoder_lr 1 --layer_decay 0.1 --drop_path 0.9"
    zero = eval_classify.main(flags(folders, tmp_path / "b", *more.split()))
    assert metrics_of(zero) == metrics_of(frozen)
    states = [torch.load(tmp_path / name / "probe.pth")["state"] for name in "ab"]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"results.json", "log.jsonl", "probe.pth"}
    assert not (tmp_path / "a/encoder.pth").exists()


def test_a_trained_encoder_is_exported_under_the_released_keys(tuned):
    results, output = tuned
    torch.manual_seed(0)
    before = pixio.create_model("pixio_vitpico16").state_dict()
    after = pixio.pixio_vitpico16(output / "encoder.pth").state_dict()
    changed = {".".join(key.split(".")[:2]) for key in after if not torch.equal(after[key], before[key])}
    assert (
        {"blocks.4", "blocks.5", "norm.weight"}
        <= changed
        <= {*("blocks.4", "blocks.5", "norm.weight", "norm.bias")}
    )
    assert results["counts"] == {"train": 7, "val": 4, "classes": 2}
    assert results["last"]["top5"] == 100
    assert results["best"]["top1"]["value"] >= results["last"]["top1"]


def test_a_resumed_run_equals_an_uninterrupted_one(folders, tuned, tmp_path, monkeypatch):
    taken, accumulate = iter(range(100)), training_loop.accumulate

    def dying(*arguments):
        if next(taken) == 1:
            raise Killed
        return accumulate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "accumulate", dying)
        with pytest.raises(Killed):
            eval_classify.main(flags(folders, tmp_path, *TUNED))
    assert metrics_of(eval_classify.main(flags(folders, tmp_path, *TUNED))) == metrics_of(tuned[0])
    states = [torch.load(run / "encoder.pth") for run in (tuned[1], tmp_path)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
def test_two_ranks_train_and_score_like_one(folders, tuned, tmp_path):
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, eval_classify.__file__, *flags(folders, tmp_path, *TUNED)]
    run_two_ranks(command, MASTER_PORT=str(free_port()), PYTHONPATH=path, OMP_NUM_THREADS="1")
    for key in ("loss", "grad_norm"):
        found, expected = ([row[key] for row in read_log(run)] for run in (tmp_path, tuned[1]))
        assert found == pytest.approx(expected, rel=5e-3)
    one, two = (torch.load(run / "encoder.pth") for run in (tuned[1], tmp_path))
    # norm.bias has no gradient but rounding noise, since BatchNorm takes it away again
    assert max((two[key] - one[key]).abs().median().item() for key in one if key != "norm.bias") < 1e-5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch_size", "3"], "batch_size must be even, found 3"),
        (["--warmup_epochs", "9"], "warmup_epochs 9 is above --epochs, which is 2"),
        (["--train_blocks", "few"], "train_blocks must be a number of blocks or all, found few"),
        (["--train_blocks", "7"], "7 blocks to train: the encoder has 6"),
        (["--encoder", "hf/somewhere", "--train_blocks", "1"], "hf/somewhere cannot be trained here"),
    ],
)
def test_mistakes_are_one_line(folders, tmp_path, more, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        eval_classify.main(flags(folders, tmp_path, *more))
    assert message in f"{stopped.value} {capsys.readouterr().err}"
