"""Predictions for photographs from the files that the evaluation leaves, in Python and by `pixio predict`."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import eval_monodepth
import eval_semseg
import numpy as np
import onnxruntime
import pytest
import torch
from helpers import free_port, write_tar
from image_sets import encoded, noise, png
from PIL import Image

import pixio
from pixio.cli.main import main
from pixio.cli.predict import _Writer, list_photos
from pixio.dense import Classes, Depth, Predictor, read_head, slide
from pixio.dense import predictor as module
from pixio.dense.export import Whole
from pixio.features import find_images
from pixio.images import decoding
from pixio.images.targets import open_depth, open_mask
from pixio.synthetic.scenes import render

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"depth": eval_monodepth, "masks": eval_semseg}
TINY = """
    --dataset folder --encoder pixio_vitfemto16 --device cpu --dtype fp32 --num_workers 0 --crop_size 32
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
    torch.save(pixio.pixio_vitfemto16(img_size=32).state_dict(), root / "encoder.pth")
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


def test_windows_of_no_pixels_are_refused(runs):
    with pytest.raises(ValueError, match="windows of 0 pixels"):
        load(runs, window=0)


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


# --- pixio predict ------------------------------------------------------------------------------------------


def predict(runs: Path, *photos: object, output: Path, task: str = "depth", flags: str = "") -> None:
    files = [str(photo) for photo in photos]
    command = f"--head {runs / task / 'head.pth'} --output {output} --device cpu {flags}"
    main(["predict", *files, *command.split()])


def test_depth_comes_as_png_npy_and_picture_under_the_names_of_the_photographs(runs, tmp_path, capsys):
    predict(runs, runs / "data/*/images", output=tmp_path, flags="--format both")
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*"))
    assert "predictions.json" in found
    assert {"depth/val/images/2.npy", "depth/val/images/2.png", "pictures/val/images/2.png"} < set(found)
    depth = np.load(tmp_path / "depth/val/images/2.npy")
    assert np.array_equal(depth, load(runs)(photo(runs)).numpy())
    png = open_depth(tmp_path / "depth/val/images/2.png", 1000).whole()
    assert np.abs(png - depth).max() <= 0.501e-3
    assert "4 photographs ->" in capsys.readouterr().out


def test_masks_come_as_palette_pngs_in_the_colors_of_the_head(runs, tmp_path):
    predict(runs, photo(runs), output=tmp_path, task="masks", flags="--no_pictures")
    file = tmp_path / "masks/2.png"
    classes = load(runs, "masks")(photo(runs))
    assert np.array_equal(open_mask(file).whole(), classes.numpy())
    colors = np.array(read_head(runs / "masks/head.pth").output.colors)
    assert np.array_equal(np.array(Image.open(file).convert("RGB")), colors[classes.numpy()])
    assert json.loads((tmp_path / "predictions.json").read_text())["class_names"] == list("abcdefg")
    assert not (tmp_path / "pictures").exists()


def test_a_stopped_run_resumes_and_another_setting_is_refused(runs, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        shown = iter(range(100))
        original = Predictor.predict

        def dying(*arguments):
            if next(shown) == 1:
                raise KeyboardInterrupt
            return original(*arguments)

        patch.setattr(Predictor, "predict", dying)
        with pytest.raises(SystemExit) as stopped:
            predict(runs, photo(runs).parent, output=tmp_path)
        assert stopped.value.code == 130
    predict(runs, photo(runs).parent, output=tmp_path)
    assert "1 photograph -> " in (said := capsys.readouterr().out)
    assert ", and 1 from before" in said
    with pytest.raises(SystemExit) as stopped:
        predict(runs, photo(runs).parent, output=tmp_path, flags="--mode whole")
    assert stopped.value.code == 2
    assert "holds predictions with mode slide, not whole: choose another" in capsys.readouterr().err


def test_broken_files_are_named_and_skipped_and_the_status_tells(runs, tmp_path, capsys):
    source = tmp_path / "photos"
    write_tar(source / "more.tar", {"../../up.png": png(7), "x/y.png": b"no image"})
    (source / "cut.png").write_bytes(png(7)[:40])
    for name in ("same.png", "same.webp"):
        Image.open(photo(runs)).save(source / name)
    (source / "out/depth").mkdir(parents=True)
    Image.open(photo(runs)).save(source / "out/depth/same.png.png")  # of an earlier run, no photograph
    with pytest.raises(SystemExit) as stopped:
        predict(runs, source, output=source / "out", flags="--no_pictures")
    assert stopped.value.code == 3
    made = sorted(str(file.relative_to(source / "out/depth")) for file in source.rglob("depth/**/*.*"))
    assert made == ["more/up.png", "same.png.png", "same.webp.png"]
    said = capsys.readouterr().err
    assert "cut.png: " in said
    assert "x/y.png: not a JPEG or PNG or WEBP image" in said
    assert "2 left out, first" in said


def test_photographs_of_one_name_are_reported_and_none_overwrites_another(tmp_path):
    write_tar(tmp_path / "a/x.tar", {"0.png": png(7)})
    write_tar(tmp_path / "b/x.tar", {"0.png": png(8), "1.png": png(9)})
    photos, errors = list_photos(find_images([str(tmp_path)]), tmp_path / "out")
    assert [found.name for found in photos] == ["x/0", "x/1"]
    assert len(errors) == 1
    assert "b/x.tar/0.png" in errors[0]
    assert "rename one" in errors[0]


def test_a_full_disk_ends_the_command_with_one_line(runs, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", refuse)
    with pytest.raises(SystemExit) as stopped:
        predict(runs, photo(runs), output=tmp_path, flags="--no_pictures")
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pixio predict: error: cannot write ")
    assert "No space left on device" in line
    assert not list(tmp_path.rglob("2*.png"))


@pytest.mark.slow
def test_two_processes_share_the_photographs(runs, tmp_path):
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    (tmp_path / "photos").mkdir()
    for seed in (2, 3):
        shutil.copy(photo(runs, seed), tmp_path / f"photos/{seed}.png")
    (tmp_path / "photos/cut.png").write_bytes(png(7)[:40])
    command = [sys.executable, *["-m", "pixio", "predict", "photos", "--head"], runs / "depth/head.pth"]
    ranks = [
        subprocess.Popen(
            [*command, "--device", "cpu"],
            cwd=tmp_path,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, 3]
    assert said == ["2 photographs -> predictions\n", ""]
    assert {file.name for file in tmp_path.rglob("depth/*.png")} == {"2.png", "3.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--depth_scale 10000", "8 m would be 80000, a 16-bit PNG ends at 65535"),
        ("--window 8", "windows of 8 pixels are below the patch size"),
        ("--pretrained nowhere.pth", "nowhere.pth"),
    ],
)
def test_mistakes_of_pixio_predict_end_with_one_line(runs, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        predict(runs, photo(runs), output=tmp_path / "out", flags=flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_far_depth_gets_a_coarser_unit(runs, tmp_path):
    predictor = load(runs)
    predictor.output = Depth(0.001, 80.0)
    assert _Writer(tmp_path, predictor, "png", None, False).units == 256


# --- onnx ---------------------------------------------------------------------------------------------------


def images_of(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_encoder_and_head_in_one_onnx_model_predict_the_same_at_any_size(runs, tmp_path, capsys):
    main(["convert", str(runs / "depth/head.pth"), str(tmp_path / "model.onnx"), "--to", "onnx"])
    assert "onnxruntime.InferenceSession(" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    predictor = load(runs, mode="whole")
    for shape in ((1, 3, 40, 56), (2, 3, 37, 91), (1, 3, 3, 3)):
        images = images_of(*shape)
        (found,) = session.run(None, {"images": images.numpy()})
        expected = torch.stack([predictor.predict(image) for image in images])
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["max_depth"]) == 8


@torch.inference_mode()
def test_what_is_exported_gives_classes_too(runs):
    predictor, images = load(runs, "masks", mode="whole"), images_of(2, 3, 37, 91)
    assert torch.equal(Whole(predictor)(images), torch.stack([predictor.predict(image) for image in images]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("{runs}/depth/head.pth out --to timm", "is a head: use --to onnx"),
        (
            "{runs}/encoder.pth out.onnx --to onnx --pretrained x",
            "is not a head, and --pretrained is only for heads",
        ),
    ],
)
def test_what_a_head_does_not_convert_to_is_said(runs, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["convert", *flags.format(runs=runs).split()])
    assert message in capsys.readouterr().err


# --- head files ---------------------------------------------------------------------------------------------


def test_a_head_file_says_all_that_predicting_needs(runs):
    head = read_head(runs / "masks/head.pth")
    assert head.encoder == "pixio_vitfemto16"
    assert head.pretrained == str(runs / "encoder.pth")
    assert (head.block_ids, head.patch_size, head.window) == ((3,), 16, (32, 21))
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
    other = pixio.pixio_vitfemto16(img_size=32)
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
    torch.save(torch.load(runs / "encoder.pth"), tmp_path / "encoder.pth")
    beside = Predictor.from_pretrained(tmp_path / "head.pth", device="cpu")  # a run that was moved as a whole
    assert torch.equal(beside(photo(runs)), load(runs)(photo(runs)))
    found = Predictor.from_pretrained(
        tmp_path / "head.pth", pixio.from_pretrained(runs / "encoder.pth"), device="cpu"
    )
    assert torch.equal(found(photo(runs)), load(runs)(photo(runs)))


def test_a_prediction_that_is_not_finite_names_the_photograph(runs):
    predictor = load(runs)
    torch.nn.init.constant_(predictor.head.predict.bias, torch.nan)
    with pytest.raises(ValueError, match=r"2\.png is not finite"):
        predictor(photo(runs))
