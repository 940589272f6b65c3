"""Curation: what the scores are, and that nothing about the run that computes them shows in the files."""

import errno
import inspect
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import curate
import numpy as np
import pytest
import torch
from helpers import write_tar
from PIL import Image, ImageDraw, ImageFont

import pixio
from pixio.data import Loader, open_stream
from pixio.data.curation import ENTROPY_SIZE, color_entropy
from pixio.engine.runtime import start_runtime
from pixio.images.normalization import normalize
from pixio.synthetic.scenes import render

ROOT = Path(__file__).resolve().parents[1]
MODEL = "pixio_vitpico16_enc128x6h4_dec128x2h4"


# ------------------------------------------------------------------------------------------------- pictures


def resized(image: Image.Image) -> torch.Tensor:
    small = image.convert("RGB").resize((ENTROPY_SIZE, ENTROPY_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def text_page(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (480, 640), tuple(map(int, rng.integers(220, 256, 3))))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(int(rng.integers(12, 22)))
    ink = tuple(map(int, rng.integers(0, 70, 3)))
    for y in range(20, 620, 26):
        pen.text((20, y), "".join(rng.choice(list("abcdefghijklmnop   "), 60)), fill=ink, font=font)
    return image


def gradient(seed: int) -> Image.Image:
    first, second = np.random.default_rng(seed).integers(0, 256, (2, 3))
    share = np.linspace(0, 1, 400)[None, :, None]
    return Image.fromarray((first * (1 - share) + second * share).astype(np.uint8).repeat(300, axis=0))


def flat_graphic(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    colors = [tuple(map(int, color)) for color in rng.integers(0, 256, (9, 3))]
    image = Image.new("RGB", (400, 300), colors[0])
    pen = ImageDraw.Draw(image)
    for color in colors[1:]:
        pen.ellipse(np.sort(rng.integers(0, 300, (2, 2)), axis=0).flatten().tolist(), fill=color)
    return image


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def scene(seed: int, side: int = 64) -> bytes:
    return jpeg(Image.fromarray(render(seed, side).image))


# -------------------------------------------------------------------------------------------------- entropy


def test_entropy_is_that_of_the_share_of_colors():
    halves = torch.zeros(3, 8, 8, dtype=torch.uint8)
    halves[0, :4] = 200
    assert color_entropy(halves) == pytest.approx(1.0)
    halves[2, :, :2] = 99  # a quarter of both
    quarter = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    assert color_entropy(halves) == pytest.approx(1.0 + quarter)


def test_entropy_has_sixteen_levels_per_channel():
    cube = torch.cartesian_prod(*[torch.arange(8, 256, 16, dtype=torch.uint8)] * 3).T.reshape(3, 64, 64)
    assert color_entropy(cube) == pytest.approx(12.0)
    assert color_entropy(cube // 16 * 16 + 5) == pytest.approx(12.0)  # moved inside the ranges
    assert color_entropy(torch.full((3, 5, 5), 255, dtype=torch.uint8)) == 0.0


@pytest.mark.parametrize("draw", [text_page, gradient, flat_graphic])
def test_pages_gradients_and_graphics_lie_below_the_threshold(draw):
    scores = [color_entropy(resized(Image.open(io.BytesIO(jpeg(draw(seed)))))) for seed in range(12)]
    assert max(scores) <= 4.5


def test_photographs_in_color_lie_above_the_threshold():
    data = pytest.importorskip("skimage.data")
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        assert color_entropy(resized(Image.fromarray(getattr(data, name)()))) > 4.5, name


# ------------------------------------------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    mae = pixio.create_model(MODEL, img_size=64, mask_grid=2)
    path = tmp_path_factory.mktemp("model") / "checkpoint.pt"
    config = {"model": MODEL, "mask_grid": 2, "norm_pix_loss": True}
    torch.save({"model": mae.state_dict(), "config": config}, path)
    return path


def test_masks_of_an_image_show_each_patch_once_and_losses_are_its_own(checkpoint, monkeypatch):
    mae, runtime = pixio.load_mae(checkpoint).eval(), start_runtime("cpu", "fp32")
    pixels = torch.stack([torch.from_numpy(render(s, 64).image).permute(2, 0, 1) for s in range(3)])
    outs, forward = [], mae.forward
    monkeypatch.setattr(mae, "forward", lambda *args: outs.append(forward(*args)) or outs[-1])
    losses = curate.reconstruction_losses(mae, runtime, pixels, [5, 6, 7], batch_size=4)
    assert torch.equal(sum(1 - out.mask for out in outs)[:3], torch.ones(3, 16))
    for i in range(3):
        one = [
            mae.loss(normalize(pixels)[i : i + 1], out.pred[i : i + 1], out.mask[i : i + 1]) for out in outs
        ]
        assert losses[i] == pytest.approx(sum(one).item() / 4, abs=6e-4)


def test_score_of_an_image_depends_on_no_other_image(checkpoint):
    mae, runtime = pixio.load_mae(checkpoint).eval(), start_runtime("cpu", "fp32")
    pixels = torch.stack([torch.from_numpy(render(s, 64).image).permute(2, 0, 1) for s in range(10)])
    together = curate.reconstruction_losses(mae, runtime, pixels, range(10), batch_size=16)
    by_threes = [
        loss
        for i in range(0, 10, 3)
        for loss in curate.reconstruction_losses(mae, runtime, pixels[i : i + 3], range(10)[i : i + 3], 3)
    ]
    assert together == by_threes
    assert len(set(together)) > 5


# ---------------------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Five tars in two folders; some images are damaged, one is rotated."""
    root = tmp_path_factory.mktemp("web")
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(5):
        members = {f"{i}{n}.jpg": scene(10 * i + n) for n in range(7)}
        members[f"{i}x.jpg"] = members[f"{i}0.jpg"][:300]
        members[f"{i}y.jpg"] = jpeg(text_page(i), exif=exif)
        write_tar(root / f"part{i % 2}" / f"{i}.tar", members)
    return root


def run(tars: Path, stats: Path, *flags: object) -> None:
    common = [
        "--data_path",
        tars,
        "--json_path",
        stats,
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--batch_size",
        4,
    ]
    curate.main([str(flag) for flag in [*common, *flags]])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}


@pytest.fixture(scope="module")
def scored(tars, checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stats")
    run(tars, folder, "--checkpoint", checkpoint)
    return folder


def test_statistics_lie_where_the_stream_looks_and_hold_the_four_scores(tars, scored):
    assert sorted(content(scored)) == sorted(
        ["loss_settings.json", *(f"part{i % 2}/{i}.json" for i in range(5))]
    )
    records = json.loads((scored / "part1" / "3.json").read_text())
    assert list(records["30.jpg"]) == ["width", "height", "histogram_score", "mae_loss"]
    assert (records["30.jpg"]["width"], records["30.jpg"]["height"]) == (64, 64)
    assert records["30.jpg"]["histogram_score"] > 4.5 >= records["3y.jpg"]["histogram_score"]
    assert (records["3y.jpg"]["width"], records["3y.jpg"]["height"]) == (640, 480)  # upright
    assert list(records["3x.jpg"]) == ["error"]

    loader = Loader(
        open_stream("webdataset", str(tars), size=8, batch_size=35, json_path=str(scored), hist_thresh=4.5)
    )
    next(iter(loader))
    assert loader.counts["kept"] == 35
    assert loader.counts["no_statistics"] == 0
    assert 0 < loader.counts["histogram"] + loader.counts["damaged"] <= 10


def test_two_processes_write_the_same_bytes(tars, scored, checkpoint, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--data_path", tars, "--json_path", tmp_path, "--checkpoint", checkpoint, "--batch_size", "4"]
    subprocess.run(
        [*command, ROOT / "pretraining" / "curate.py", *flags, "--device", "cpu", "--num_workers", "1"],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert content(tmp_path) == content(scored)


def test_interrupted_run_goes_on_and_writes_the_same_bytes(tars, scored, checkpoint, tmp_path, monkeypatch):
    write, calls = curate.write_statistics, []

    def interrupt(path, records):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(path, records)

    monkeypatch.setattr(curate, "write_statistics", interrupt)
    with pytest.raises(SystemExit, match="130"):
        run(tars, tmp_path, "--checkpoint", checkpoint)
    assert len(content(tmp_path)) == 3  # two tars and the settings
    run(tars, tmp_path, "--checkpoint", checkpoint)
    assert len(calls) == 6  # three before, three after: nothing twice
    assert content(tmp_path) == content(scored)


def test_tar_on_a_failing_disk_is_not_damaged_but_scored_by_the_next_run(tars, scored, tmp_path, monkeypatch):
    def fail(descriptor, offset, size):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("pixio.data.shards.read_member", fail)
    run(tars, tmp_path, "--only", "size")
    assert content(tmp_path) == {}
    monkeypatch.undo()
    run(tars, tmp_path, "--only", "size")
    assert len(content(tmp_path)) == 5


def test_ranks_wait_longer_for_each_other_than_for_a_step_of_training(tars, tmp_path, monkeypatch):
    asked = {}

    def start(*args, **options):
        bound = inspect.signature(start_runtime).bind(*args, **options)
        bound.apply_defaults()
        asked.update(bound.arguments)
        return start_runtime(*args, **options)

    monkeypatch.setattr(curate, "start_runtime", start)
    run(tars, tmp_path, "--only", "size")
    assert (asked["parallel"], asked["timeout_minutes"]) == ("ddp", curate.PATIENCE)


def test_statistics_of_others_are_completed(tars, scored, tmp_path):
    (tmp_path / "part0").mkdir()
    (tmp_path / "part0" / "0.json").write_text('{"00.jpg": 3, "01.jpg": {"width": null, "height": 64}}')
    run(tars, tmp_path, "--only", "size")
    sizes = json.loads((tmp_path / "part0" / "0.json").read_text())
    assert sizes["00.jpg"] == sizes["01.jpg"] == {"width": 64, "height": 64}


def test_scores_may_be_computed_one_after_the_other(tars, scored, checkpoint, tmp_path):
    run(tars, tmp_path, "--only", "size")
    assert list(json.loads((tmp_path / "part0" / "0.json").read_text())["00.jpg"]) == ["width", "height"]
    run(tars, tmp_path, "--only", "size,entropy")
    run(tars, tmp_path, "--only", "loss", "--checkpoint", checkpoint)
    assert content(tmp_path) == content(scored)


def test_losses_of_different_models_are_not_mixed(tars, scored, tmp_path):
    torch.manual_seed(1)
    other = tmp_path / "other.pt"
    config = {"model": MODEL, "mask_grid": 2, "norm_pix_loss": True}
    torch.save({"model": pixio.create_model(MODEL, img_size=64).state_dict(), "config": config}, other)
    with pytest.raises(SystemExit, match="choose another --json_path"):
        run(tars, scored, "--checkpoint", other)


def test_damaged_tar_is_named_and_the_rest_is_scored(tmp_path, capsys):
    write_tar(tmp_path / "tars" / "a" / "good.tar", {"0.jpg": scene(0)})
    (tmp_path / "tars" / "a" / "empty.tar").touch()
    run(tmp_path / "tars", tmp_path / "stats", "--only", "size,entropy")
    said = capsys.readouterr()
    assert "damaged tar a/empty.tar" in said.err
    assert "damaged tars 1" in said.out
    assert list(content(tmp_path / "stats")) == ["a/good.json"]


def test_tars_that_would_share_a_file_are_refused(tmp_path):
    for folder in ("x", "y"):
        write_tar(tmp_path / "tars" / folder / "same" / "0.tar", {"0.jpg": scene(0)})
    with pytest.raises(SystemExit, match=r"would share .*same/0\.json"):
        run(tmp_path / "tars", tmp_path / "stats", "--only", "size")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "size,color"], "color: choose from size, entropy, loss"),
        (["--only", "loss"], "--checkpoint is needed"),
        (["--only", "size", "--checkpoint", "x.pt"], "only for it"),
        (
            ["--only", "size", "--mask_ratio", "0"],
            "--mask_ratio must be a number above 0 and below 1, found 0",
        ),
    ],
)
def test_mistakes_are_one_clear_line(tars, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(tars, tmp_path / "stats", *flags)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"


def test_report_draws_what_is_kept_and_dropped(tars, scored, tmp_path, capsys):
    flags = ["--data_path", str(tars), "--json_path", str(scored), "--output", str(tmp_path)]
    curate.main(["report", *flags, "--imgres_thresh", "64"])
    summary = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(capsys.readouterr().out) == summary
    assert (summary["images"], summary["damaged"]) == (45, 5)
    assert summary["kept by histogram_score above"]["4.5"] == pytest.approx(35 / 40)
    assert summary["kept by shorter side from"]["320"] == pytest.approx(5 / 40)
    for name in ("kept", "dropped", "nearly_dropped", "histograms"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 400


def test_report_looks_at_so_many_tars_spread_over_the_set(tars, scored, tmp_path):
    flags = ["--data_path", str(tars), "--json_path", str(scored), "--output", str(tmp_path)]
    curate.main(["report", *flags, "--max_tars", "3"])
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 27
    with pytest.raises(SystemExit):
        curate.main(["report", *flags, "--max_tars", "0"])


def test_report_says_that_a_tar_has_changed_since_it_was_scored(tars, tmp_path):
    write_tar(tmp_path / "tars" / "a" / "0.tar", {"0.jpg": scene(0), "1.jpg": scene(1)})
    run(tmp_path / "tars", tmp_path / "stats", "--only", "size,entropy")
    write_tar(tmp_path / "tars" / "a" / "0.tar", {"0.jpg": scene(0)})
    flags = ["--data_path", tmp_path / "tars", "--json_path", tmp_path / "stats", "--output", tmp_path]
    with pytest.raises(SystemExit, match=r"a/0\.tar has no member '1\.jpg'"):
        curate.main(["report", *map(str, flags)])
