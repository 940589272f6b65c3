"""Predictions for photographs from the files that the evaluation leaves."""

from pathlib import Path

import eval_monodepth
import eval_semseg
import numpy as np
import pytest
import torch
from image_sets import encoded, noise
from PIL import Image

import pixio
from pixio.dense import Classes, Depth, Predictor, read_head, slide
from pixio.dense import predictor as module
from pixio.images import decoding
from pixio.synthetic.scenes import render

PROGRAMS = {"depth": eval_monodepth, "masks": eval_semseg}
TINY = """
    --dataset folder --encoder pixio_vitpico16 --device cpu --dtype fp32 --num_workers 0 --crop_size 32
    --epochs 1 --batch_size 1 --batches_per_step 2 --head linear --lr 1e-2 --panels 1 --save_minutes 0
"""
FLAGS = {"depth": "--max_depth 8", "masks": "--nclass 7 --class_names a b c d e f g"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Heads for depth and masks that the programs trained: `depth/head.pth`, `masks/head.pth`.

    The encoder is `encoder.pth`, the photographs lie in `data/val/images`; what the programs predicted for
    them is in `seen.pth`.
    """
    root = tmp_path_factory.mktemp("runs")
    for split, seeds in (("train", (0, 1)), ("val", (2, 3))):
        for folder in ("images", "depth", "masks"):
            (root / "data" / split / folder).mkdir(parents=True)
        for seed in seeds:
            scene = render(seed, (40, 56))
            Image.fromarray(scene.image).save(root / "data" / split / f"images/{seed}.png")
            Image.fromarray((scene.depth * 1000).astype(np.uint16)).save(
                root / "data" / split / f"depth/{seed}.png"
            )
            Image.fromarray(scene.semantics.astype(np.uint8)).save(
                root / "data" / split / f"masks/{seed}.png"
            )
    torch.manual_seed(3)
    torch.save(pixio.pixio_vitpico16(img_size=32).state_dict(), root / "encoder.pth")
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        for task, program in PROGRAMS.items():
            scores = {"depth": "DepthScores", "masks": "SegmentationScores"}[task]
            patch.setattr(program, scores, recording(getattr(program, scores), seen.setdefault(task, [])))
            flags = f"--data_root {root / 'data'} --pretrained_ckp {root / 'encoder.pth'} {FLAGS[task]}"
            program.main(f"{TINY} {flags} --output_dir {root / task}".split())
    torch.save(seen, root / "seen.pth")
    return root


def recording(scores: type, seen: list) -> type:
    """The same scores, which keep the predictions."""

    class Recording(scores):
        def add(self, index, prediction, target):
            seen.append(prediction.clone())
            super().add(index, prediction, target)

    return Recording


def load(runs: Path, task: str = "depth", **options) -> Predictor:
    return Predictor.from_pretrained(runs / task / "head.pth", device="cpu", **options)


def photo(runs: Path, seed: int = 2) -> Path:
    return runs / f"data/val/images/{seed}.png"


# --- predictions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["depth", "masks"])
def test_predictions_are_those_of_the_evaluation_bit_for_bit(runs, task):
    predictor = load(runs, task)
    found = predictor([photo(runs), photo(runs, 3)])
    for prediction, expected in zip(found, torch.load(runs / "seen.pth")[task], strict=True):
        assert prediction.shape == (40, 56)
        assert torch.equal(prediction, expected)
    assert predictor.class_names == (tuple("abcdefg") if task == "masks" else ())


def test_depth_is_in_meters_within_its_range_and_classes_are_bytes(runs):
    depth, classes = (load(runs, task)(photo(runs)) for task in ("depth", "masks"))
    assert depth.dtype == torch.float32
    assert 0.001 <= depth.min() < depth.max() <= 8
    assert classes.dtype == torch.uint8
    assert classes.max() < 7


def test_paths_bytes_images_arrays_and_batches_of_them_are_alike(runs):
    predictor, path = load(runs), photo(runs)
    image = Image.open(path)
    expected = predictor(path)
    sources = [str(path), path.read_bytes(), image, np.array(image)]
    batch = predictor(np.stack([np.array(image)] * 2))
    for prediction in [*map(predictor, sources), *predictor(sources), *batch]:
        assert torch.equal(prediction, expected)


def test_whole_photographs_go_through_the_network_in_one_padded_piece(runs):
    predictor = load(runs, "masks", mode="whole")
    pixels = torch.from_numpy(np.array(Image.open(photo(runs)))).permute(2, 0, 1)
    padded = torch.zeros(1, 3, 48, 64)
    padded[0, :, :40, :56] = pixio.images.normalization.normalize(pixels)
    with torch.inference_mode():
        logits = predictor.head(predictor.frozen(padded), (48, 64))
    assert torch.equal(predictor(photo(runs)), logits[0, :, :40, :56].argmax(0).byte())


def test_bf16_predicts_nearly_the_same_depth(runs, monkeypatch):
    monkeypatch.setattr("pixio.engine.runtime._cpu_computes_bf16", lambda: True)
    exact, rounded = load(runs)(photo(runs)), load(runs, dtype="bf16")(photo(runs))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_transparency_sixteen_bits_and_tiny_photographs_are_predicted(runs):
    predictor = load(runs)
    gray = np.full((20, 24), 40_000, np.uint16)
    clear = noise(24, 20).convert("RGBA")
    clear.putalpha(0)
    same = predictor(np.full((20, 24), 40_000 >> 8, np.uint8))
    assert torch.equal(predictor(encoded(Image.fromarray(gray), "png")), same)
    white = predictor(np.full((20, 24, 3), 255, np.uint8))
    assert torch.equal(predictor(encoded(clear, "png")), white)
    for mode in ("slide", "whole"):
        assert load(runs, mode=mode)(noise(3, 3)).shape == (3, 3)
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        predictor.predict(torch.zeros(3, 5, 0, dtype=torch.uint8))


# --- memory -------------------------------------------------------------------------------------------------


def test_sums_are_kept_for_one_row_of_windows(monkeypatch):
    largest = []
    original = module.Classes.decide

    def decide(self, averages):
        largest.append(averages.numel())
        return original(self, averages)

    monkeypatch.setattr(module.Classes, "decide", decide)
    image = torch.randint(256, (3, 500, 70), dtype=torch.uint8)
    output = Classes.of(("a", "b"))
    slide(lambda windows: windows[:, :2], image, 32, 21, 4, output.decide)
    assert max(largest) == 2 * 21 * 70
    assert len(largest) == -(-500 // 21)


def test_a_panorama_of_16k_is_read_and_larger_files_are_refused(runs, monkeypatch):
    predictor, shown = load(runs), []
    monkeypatch.setattr(
        decoding, "to_rgb", lambda image: shown.append(image.size) or Image.new("RGB", (4, 4))
    )  # the panorama itself would take seconds
    predictor(encoded(Image.new("1", (16_384, 8_192)), "png"))
    assert shown == [(16_384, 8_192)]
    with pytest.raises(ValueError, match="exceeds limit of 178956970 pixels"):
        predictor(encoded(Image.new("1", (16_384, 16_384)), "png"))


def test_a_photograph_too_large_for_one_piece_names_the_limit_and_the_remedy(runs, monkeypatch):
    monkeypatch.setattr(module, "WHOLE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"2\.png has 56 x 40 pixels, .* up to 1,000 pixels: use mode slide"):
        load(runs, mode="whole")(photo(runs))


# --- head files ---------------------------------------------------------------------------------------------


def test_a_head_file_says_all_that_predicting_needs(runs):
    head = read_head(runs / "masks/head.pth")
    assert head.encoder == "pixio_vitpico16"
    assert head.pretrained == str(runs / "encoder.pth")
    assert (head.block_ids, head.patch_size, head.window) == ((5,), 16, (32, 21))
    assert head.output.names == tuple("abcdefg")
    assert len(set(head.output.colors)) == 7
    assert read_head(runs / "depth/head.pth").output == Depth(0.001, 8.0)


@pytest.mark.parametrize("task", ["depth", "masks"])
def test_an_older_head_file_loads_once_the_encoder_is_given(runs, tmp_path, task):
    content = torch.load(runs / task / "head.pth")
    torch.save({key: content[key] for key in ("identity", "epoch", "state")}, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"old\.pth does not say where the weights .* --pretrained"):
        Predictor.from_pretrained(tmp_path / "old.pth")
    old = Predictor.from_pretrained(tmp_path / "old.pth", runs / "encoder.pth", device="cpu", window=32)
    assert torch.equal(old(photo(runs)), load(runs, task)(photo(runs)))
    assert old.class_names == (tuple(f"class {c}" for c in range(7)) if task == "masks" else ())
    assumed = Predictor.from_pretrained(tmp_path / "old.pth", runs / "encoder.pth", device="cpu")
    assert assumed.window == (256, 170)


def test_a_head_of_another_encoder_is_refused_with_both_fingerprints(runs, tmp_path):
    other = pixio.pixio_vitpico16(img_size=32)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    ours, theirs = (
        pixio.models.external.fingerprint(e)[:16]
        for e in (pixio.from_pretrained(runs / "encoder.pth"), other)
    )
    for encoder in (other, tmp_path / "other.pth"):
        with pytest.raises(ValueError, match=rf"fingerprint {ours}, found {theirs} .*then at .*encoder\.pth"):
            load(runs, encoder=encoder)


def test_weights_that_are_gone_are_asked_for(runs, tmp_path):
    content = torch.load(runs / "depth/head.pth")
    torch.save(content | {"pretrained": "/gone/encoder.pth"}, tmp_path / "head.pth")
    with pytest.raises(FileNotFoundError, match=r"no longer at /gone/encoder\.pth: give their file"):
        Predictor.from_pretrained(tmp_path / "head.pth")
    found = Predictor.from_pretrained(
        tmp_path / "head.pth", pixio.from_pretrained(runs / "encoder.pth"), device="cpu"
    )
    assert torch.equal(found(photo(runs)), load(runs)(photo(runs)))


def test_a_prediction_that_is_not_finite_names_the_photograph(runs):
    predictor = load(runs)
    torch.nn.init.constant_(predictor.head.predict.bias, torch.nan)
    with pytest.raises(ValueError, match=r"2\.png is not finite"):
        predictor(photo(runs))
