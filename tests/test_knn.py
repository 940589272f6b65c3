"""k-NN: the search and the vote against independent ones, and the program from a folder to its results."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import eval_knn
import feature_bank
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from feature_bank import PooledFeatures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from pixio.features import FeatureStore, KNNClassifier, knn

ROOT = Path(__file__).resolve().parents[1]


CPU = torch.device("cpu")
FLAGS = "--model pixio_vitpico16 --input_size 32 --dtype fp32 --device cpu --num_workers 0 --nb_knn 1 3 10"


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def search(
    queries: torch.Tensor, bank: torch.Tensor, k: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    nearest = knn.Nearest(queries, k)
    for start in range(0, len(bank), block):
        nearest.add(bank[start : start + block], start)
    return nearest.result()


# ------------------------------------------------------------------------------------------- search and vote


@pytest.mark.parametrize("block", [40, 256, 5000])
def test_the_figures_are_those_of_scikit_learns_weighted_classifier(block):
    ks, classes = (1, 10, 37), 12
    centers = unit(classes, 24)
    labels, targets = torch.arange(1500) % classes, torch.arange(700) % classes
    bank = F.normalize(centers[labels] + unit(1500, 24, seed=1), dim=1)
    queries = F.normalize(centers[targets] + 1.2 * unit(700, 24, seed=2), dim=1)
    similarities, indices = search(queries, bank, 37, block)
    found = knn.count_correct(similarities, labels[indices], targets, ks, 0.07, classes)
    for k, (top1, top5) in zip(ks, found.tolist(), strict=True):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        scores = theirs.fit(bank.double().numpy(), labels.numpy()).predict_proba(queries.double().numpy())
        ranked = np.argsort(-scores, axis=1, kind="stable")[:, :5]
        hits = (ranked == targets.numpy()[:, None]) & (np.take_along_axis(scores, ranked, axis=1) > 0)
        assert (top1, top5) == (hits[:, :1].sum(), hits.any(1).sum())
        assert 0.3 < top1 / 700 < 1  # neither trivial nor chance


@pytest.mark.parametrize("k", [1, 20])
def test_the_classifier_is_scikit_learns(k):
    features, labels, queries = unit(400, 16), torch.arange(400) % 5, 3 * unit(90, 16, seed=1)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(features.double().numpy(), labels.numpy())
    ours = KNNClassifier(k).fit(5 * features, labels)
    assert ours.predict(queries).tolist() == theirs.predict(queries.double().numpy()).tolist()
    distances, indices = theirs.kneighbors(queries.double().numpy())
    similarities, found = ours.kneighbors(queries)
    np.testing.assert_array_equal(found.numpy(), indices)
    np.testing.assert_allclose(1 - similarities.numpy(), distances, atol=1e-6)


def test_a_classifier_with_fewer_vectors_than_neighbors_is_refused():
    with pytest.raises(ValueError, match="3 vectors with 3 labels for k = 4"):
        KNNClassifier(4).fit(unit(3, 8), torch.arange(3))


@pytest.mark.parametrize("k", [0, -1])
def test_a_classifier_without_neighbors_is_refused(k):
    with pytest.raises(ValueError, match=f"3 vectors with 3 labels for k = {k}: .* k from 1"):
        KNNClassifier(k).fit(unit(3, 8), torch.arange(3))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 90),
    q=st.integers(1, 5),
    k=st.integers(1, 90),
    block=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_ties_go_to_the_first_in_the_bank(n, q, k, block, seed):
    k = min(k, n)
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: products are exact, and most of them equal.
    queries = torch.randint(-1, 2, (q, 3), generator=generator).float()
    bank = torch.randint(-1, 2, (n, 3), generator=generator).float()
    similarities, indices = search(queries, bank, k, block)
    expected = (queries @ bank.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(similarities, expected.values[:, :k])
    assert torch.equal(indices.long(), expected.indices[:, :k])


def test_more_queries_than_fit_a_product_are_searched_alike():
    queries, bank = unit(knn.QUERIES + 9, 16), unit(300, 16, seed=1)
    _, indices = search(queries, bank, 20, 128)
    assert torch.equal(indices.long(), (queries @ bank.T).topk(20).indices)


def test_a_class_without_a_vote_is_no_prediction():
    similarities, labels = torch.tensor([[0.9, 0.8], [0.9, 0.8]]), torch.tensor([[3, 3], [3, 4]])
    counts = knn.count_correct(similarities, labels, torch.tensor([0, 4]), (1, 2), 0.07, 6)
    assert counts.tolist() == [[0, 0], [0, 1]]


def test_equally_supported_classes_are_ranked_by_their_number():
    similarities, labels = torch.tensor([[0.5, 0.5]] * 2), torch.tensor([[2, 1]] * 2)
    counts = knn.count_correct(similarities, labels, torch.tensor([1, 2]), (2,), 0.07, 3)
    assert counts.tolist() == [[1, 2]]


def test_a_cold_temperature_does_not_overflow():
    similarities, labels = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[1, 0, 0]])
    assert knn.count_correct(similarities, labels, torch.tensor([1]), (3,), 1e-5, 2).tolist() == [[1, 1]]


@pytest.mark.parametrize("width", [384, 3072])
@pytest.mark.parametrize("memory", [0.1, 1.0, 16.0])
def test_a_search_holds_no_more_than_its_memory(width, memory):
    block, queries = knn.block_sizes(width, 200, memory, torch.device("meta"))
    vectors = 4 * width * (block + queries)
    similarities = 4 * knn.QUERIES * block
    assert vectors + similarities <= memory * 2**30
    assert queries % knn.QUERIES == 0


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"--memory_gb 0\.001 is too little.*need 0\.0\d"):
        knn.block_sizes(1280, 200, 0.001, CPU)


# ------------------------------------------------------------------------------------------------ the program


def write_images(root: Path, split: str, counts: dict[str, int], size: int = 32) -> None:
    """Noise around a color of its own for each class."""
    for number, (name, count) in enumerate(counts.items()):
        (root / split / name).mkdir(parents=True)
        rng = np.random.default_rng([number, len(split)])
        for i in range(count):
            pixels = rng.normal(60 + 50 * number, 70, (size, size + i % 3, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i:03d}.png")


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "data", "train", {"ash": 11, "birch": 9, "cedar": 12})
    write_images(tmp_path / "data", "val", {"birch": 7, "cedar": 6})
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts and products of few images, so that there is something to share and to resume.

    One thread, as in the processes that torchrun starts: sums are then rounded alike.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(feature_bank, "PART", 4)
    monkeypatch.setattr(knn, "QUERIES", 4)
    yield
    torch.set_num_threads(threads)


def run(data: Path, output: Path, *flags: str) -> dict:
    eval_knn.main([*shlex.split(FLAGS), "--data_path", str(data), "--output_dir", str(output), *flags])
    return json.loads((output / "results.json").read_text())


def metrics(results: dict) -> dict:
    return {key: results[key] for key in ("k", "blocks", "counts", "encoder_sha256", "reported_k")}


def features_of(output: Path) -> dict[str, bytes]:
    return {str(f.relative_to(output)): f.read_bytes() for f in sorted((output / "features").rglob("*.*"))}


def reference(data: Path, block: int, pool) -> tuple[np.ndarray, list[str], np.ndarray, list[str]]:
    """Embeddings and classes of both splits, one image at a time, with torchvision's transforms."""
    from torchvision.transforms import v2

    from pixio.images.normalization import IMAGENET_MEAN, IMAGENET_STD
    from pixio.models.external import load_encoder

    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    torch.manual_seed(0)
    encoder = load_encoder("pixio_vitpico16")
    parts = []
    for split in ("train", "val"):
        files = sorted((data / split).glob("*/*.png"))
        with torch.no_grad():
            vectors = [pool(encoder(transform(Image.open(file))[None], [block])[0])[0] for file in files]
        parts += [
            F.normalize(torch.stack(vectors), dim=1).double().numpy(),
            [file.parent.name for file in files],
        ]
    return parts


@pytest.mark.parametrize(
    ("flags", "pool"),
    [
        ("", lambda features: features["cls_tokens"].mean(1)),
        ("--pool first", lambda features: features["cls_tokens"][:, 0]),
        ("--pool patch", lambda features: features["patch_tokens"].mean(1)),
    ],
    ids=["cls", "first", "patch"],
)
def test_the_program_follows_the_protocol(data, tmp_path, flags, pool):
    results = run(data, tmp_path / "out", *shlex.split(flags))
    bank, labels, queries, targets = reference(data, 5, pool)
    for k in (1, 3, 10):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        expected = 100 * theirs.fit(bank, labels).score(queries, targets)
        assert results["k"][str(k)]["top1"] == pytest.approx(expected)
    assert results["counts"] == {"train": 32, "val": 13, "classes": 3}
    assert results["reported_k"] == 1


def test_every_block_is_measured_in_one_pass_with_a_plot(data, tmp_path):
    results = run(data, tmp_path / "out", "--per_block")
    last = run(data, tmp_path / "other")
    assert [row["block"] for row in results["blocks"]] == list(range(6))
    assert results["k"] == last["k"]
    bank, labels, queries, targets = reference(data, 2, lambda features: features["cls_tokens"].mean(1))
    theirs = KNeighborsClassifier(3, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = 100 * theirs.fit(bank, labels).score(queries, targets)
    assert results["blocks"][2]["k"]["3"]["top1"] == pytest.approx(expected)
    Image.open(tmp_path / "out" / "blocks.png").verify()


RANK = """
import eval_knn, feature_bank
from pixio.features import knn
feature_bank.PART = knn.QUERIES = 4
eval_knn.main()
"""


def torchrun(ranks: int, data: Path, output: Path, *flags: str) -> dict:
    script = output.parent / "rank.py"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'evaluation'}",
    }
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [
        str(script),
        *shlex.split(FLAGS),
        "--data_path",
        str(data),
        "--output_dir",
        str(output),
        *flags,
    ]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return json.loads((output / "results.json").read_text())


def test_two_ranks_give_the_figures_and_features_of_one(data, tmp_path):
    alone = run(data, tmp_path / "one", "--per_block")
    both = torchrun(2, data, tmp_path / "two", "--per_block")
    assert metrics(both) == metrics(alone)
    assert both["ranks"] == 2
    assert features_of(tmp_path / "two") == features_of(tmp_path / "one")


def test_more_ranks_than_parts_count_every_image_once(tmp_path):
    write_images(tmp_path / "data", "train", {"ash": 3, "birch": 2})
    write_images(tmp_path / "data", "val", {"ash": 2, "birch": 1})
    alone = run(tmp_path / "data", tmp_path / "one")
    both = torchrun(2, tmp_path / "data", tmp_path / "two")
    assert metrics(both) == metrics(alone)


def test_a_killed_run_goes_on_with_the_parts_it_lacks(data, tmp_path, monkeypatch):
    whole = run(data, tmp_path / "whole")
    write = FeatureStore._write
    made = []

    def die_after_three(self, part, *features):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(part)
        write(self, part, *features)

    monkeypatch.setattr(FeatureStore, "_write", die_after_three)
    with pytest.raises(SystemExit, match="130"):
        run(data, tmp_path / "cut")
    assert not (tmp_path / "cut" / "results.json").exists()
    again = []
    monkeypatch.setattr(
        FeatureStore, "_write", lambda self, part, *x: (again.append(part), write(self, part, *x))
    )
    assert metrics(run(data, tmp_path / "cut")) == metrics(whole)
    assert again == [3, 4, 5, 6, 7, 0, 1, 2, 3]  # the rest of train, then val
    assert features_of(tmp_path / "cut") == features_of(tmp_path / "whole")


def test_features_are_reused_only_for_the_same_encoder_images_and_settings(data, tmp_path, monkeypatch):
    run(data, tmp_path / "out")
    calls = []
    compute = PooledFeatures.compute
    monkeypatch.setattr(
        PooledFeatures,
        "compute",
        lambda self, encoder, images: (calls.append(len(images)), compute(self, encoder, images))[1],
    )
    run(data, tmp_path / "out", "--nb_knn", "5", "--memory_gb", "1", "--batch_size_per_gpu", "2")
    assert sum(calls) == 0
    run(data, tmp_path / "out", "--pool", "patch")
    assert sum(calls) == 32 + 13
    calls.clear()
    os.utime(data / "val" / "birch" / "000.png", ns=(0, 0))
    run(data, tmp_path / "out")
    assert sum(calls) == 13
    calls.clear()
    import pixio

    torch.save(pixio.create_model("pixio_vitpico16").state_dict(), tmp_path / "encoder.pth")
    run(data, tmp_path / "out", "--pretrained_ckp", str(tmp_path / "encoder.pth"))
    assert sum(calls) == 32 + 13


def test_an_empty_weight_file_means_random_weights_and_old_launchers_flags_are_accepted(data, tmp_path):
    flags = ["--pretrained_ckp", "", "--local-rank", "0", "--port", "29511"]
    assert metrics(run(data, tmp_path / "one", *flags)) == metrics(run(data, tmp_path / "two"))


def test_features_of_an_earlier_version_are_named_as_unused(data, tmp_path, capsys):
    (tmp_path / "out/features/train_0").mkdir(parents=True)
    (tmp_path / "out/features/train_0/part_00000.npy").write_bytes(b"")
    run(data, tmp_path / "out")
    assert (
        "train_0 has features of an earlier version, which are not used: remove it" in capsys.readouterr().out
    )


def test_patch_14_sees_a_multiple_of_14(data, tmp_path):
    flags = ["--model", "timm/test_vit", "--input_size", "40"]
    assert run(data, tmp_path / "out", *flags)["input"] == {"resize": 40, "crop": 32}


def test_fewer_training_images_than_neighbors_is_said_and_works(data, tmp_path, capsys):
    results = run(data, tmp_path / "out", "--nb_knn", "10", "200", "100")
    assert list(results["k"]) == ["10", "32"]
    output = capsys.readouterr().out
    assert "32 training images: 32 neighbors instead of up to 200" in output
    assert "3 classes: top-5 counts every class that has a vote" in output


def fails(data: Path, output: Path, capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(data, output, *flags)
    assert not (output / "results.json").exists()
    return str(stop.value.code) + capsys.readouterr().err


def test_an_unreadable_image_is_named(data, tmp_path, capsys):
    (data / "train" / "cedar" / "003.png").write_bytes(b"not an image")
    message = fails(data, tmp_path / "out", capsys)
    assert "cedar/003.png cannot be read" in message
    assert "replace or remove it" in message


def test_features_that_are_not_finite_are_named(data, tmp_path, capsys):
    import pixio

    state = pixio.create_model("pixio_vitpico16").state_dict()
    state["cls_token"][0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "encoder.pth")
    message = fails(data, tmp_path / "out", capsys, "--pretrained_ckp", str(tmp_path / "encoder.pth"))
    assert "ash/000.png are not finite" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input_size -32", "--input_size must be a positive integer, found -32"),
        ("--input_size 8", "--input_size 8 is below the patch size, 16 pixels"),
        ("--nb_knn 0 5", "--nb_knn must be a positive integer, found 0"),
    ],
)
def test_mistakes_end_with_one_line_that_says_what_to_do(data, tmp_path, capsys, flags, message):
    assert message in fails(data, tmp_path / "out", capsys, *flags.split())


def test_a_missing_split_is_named(data, tmp_path, capsys):
    assert "no folder" in fails(data / "train", tmp_path / "out", capsys)


def test_a_validation_class_without_training_images_is_named(data, tmp_path, capsys):
    (data / "val" / "birch").rename(data / "val" / "oak")
    assert "classes without training images: oak" in fails(data, tmp_path / "out", capsys)


def test_an_encoder_without_class_tokens_needs_another_pool(data, tmp_path, capsys):
    flags = ["--model", "timm/vit_base_patch16_siglip_gap_224"]
    assert "no class tokens: use --pool patch" in fails(data, tmp_path / "out", capsys, *flags)


def test_a_damaged_feature_file_is_named(data, tmp_path, capsys):
    run(data, tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    part = next((tmp_path / "out" / "features").rglob("train_*/part_000000.safetensors"))
    part.write_bytes(part.read_bytes()[:-10])
    message = fails(data, tmp_path / "out", capsys)
    assert "part_000000.safetensors is damaged" in message
    assert "delete it" in message


def test_hidden_files_and_other_files_are_no_images(data, tmp_path):
    (data / "train" / "ash" / "._000.png").write_bytes(b"")
    (data / "train" / "ash" / "notes.txt").write_text("")
    (data / "train" / ".cache").mkdir()
    assert len(feature_bank.list_classes(data / "train")) == 32


# -------------------------------------------------------------------------------------------- launch script


def launch(tmp_path: Path, script: Path, cwd: Path, **environment: str) -> str:
    """Run a launch script where python, torchrun and srun only print where they are and their arguments."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun", "srun"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho "$PWD: {name} $*"\n')
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(script), "pixio_vitb16", "weights.pth", "--per_block"]
    done = subprocess.run(
        command, cwd=cwd, env={"PATH": path, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


EVALUATION = ROOT / "evaluation"
PROGRAM = "eval_knn.py --model pixio_vitb16 --pretrained_ckp weights.pth --per_block"


def test_the_launch_script_runs_one_process_from_anywhere(tmp_path):
    found = launch(tmp_path, EVALUATION / "launch_knn.sh", tmp_path)
    assert found == f"{EVALUATION}: python {PROGRAM}"


def test_the_launch_script_starts_a_rank_for_each_gpu(tmp_path):
    found = launch(tmp_path, EVALUATION / "launch_knn.sh", ROOT, GPUS="4")
    assert found == f"{EVALUATION}: torchrun --standalone --nproc_per_node 4 {PROGRAM}"


@pytest.mark.parametrize("submitted_from", [ROOT, EVALUATION])
def test_the_copy_that_slurm_runs_finds_its_folder(tmp_path, submitted_from):
    copy = tmp_path / "slurm_script"
    copy.write_text((EVALUATION / "launch_knn.sh").read_text())
    found = launch(tmp_path, copy, tmp_path, SLURM_JOB_ID="1", SLURM_SUBMIT_DIR=str(submitted_from))
    assert found.startswith(f"{EVALUATION}: srun ")
    assert found.endswith(f"python {PROGRAM}")
