"""Every `pixio` command does what its help says, and mistakes end it with one line."""

import dataclasses
import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from helpers import ALONE, write_tar
from PIL import Image

import pixio
from pixio.cli.common import INCOMPLETE
from pixio.cli.main import COMMANDS, main
from pixio.engine.checkpoint import Checkpoints
from pixio.engine.config import parse


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with photographs, a small run with a checkpoint, and its encoder."""
    root = tmp_path_factory.mktemp("here")
    rng = np.random.default_rng(0)
    for name, size in (("a", (40, 60)), ("b", (64, 32))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f"{name}.png")
    torch.manual_seed(0)
    encoder = pixio.PixioViT(img_size=32, embed_dim=16, depth=2, num_heads=2)
    mae = pixio.PixioMAE(encoder, 16, 1, 2, mask_grid=1)
    content = {"model": mae.state_dict(), "config": {"model": "tiny_enc16x2h2_dec16x1h2", "mask_grid": 1}}
    Checkpoints(root / "run/checkpoints", ALONE).save(1, content)
    (root / "run/log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "lr": 0.1}) + "\n")
    torch.save(encoder.state_dict(), root / "encoder.pth")
    torch.save(pixio.pixio_vitpico16().state_dict(), root / "pico.pth")
    return root


@pytest.fixture(autouse=True)
def in_that_folder(here, monkeypatch):
    monkeypatch.chdir(here)


def fail(capsys, command):
    """The only line that a wrong command leaves."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("pixio")
    return line


def help_of(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- help
def test_the_commands_are_those_listed(capsys):
    text = help_of(capsys, "--help")
    found = re.findall(r"^    (\w+)(?:  |$)", text, re.MULTILINE)
    assert sorted(found) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_an_example_that_its_command_takes(command, capsys, monkeypatch):
    text = help_of(capsys, command)
    example = re.search(rf"^example: pixio ({command} .*)$", text, re.MULTILINE)[1]
    calls = []
    monkeypatch.setattr(COMMANDS[command], "run", lambda self: calls.append(self))
    main(shlex.split(example))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "line",
    (Path(__file__).parent / "flags.txt").read_text().splitlines(),
    ids=lambda line: line.split(":")[0],
)
def test_no_flag_of_a_command_or_program_was_ever_taken_away(line, capsys):
    name, _, flags = line.partition(": ")
    if name.startswith("pixio "):
        run = functools.partial(main, [name.split()[1], "--help"])
    elif name.startswith("submitit"):
        config = importlib.import_module(name).SubmitConfig
        run = functools.partial(parse, config, ["--help"])
    else:
        module, *command = name.split()
        run = functools.partial(importlib.import_module(module).main, [*command, "--help"])
    with pytest.raises(SystemExit):
        run()
    shown = re.findall(r"^  (-.*?)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    assert set(flags.split()) <= {flag for text in shown for flag in re.findall(r"--([\w-]+)", text)}


# Options without a range: block numbers count from the end too.
UNBOUNDED = {"block", "blocks"}
CONFIGS = {
    "main_pretrain": "PretrainConfig",
    "curate": "CurateConfig ReportConfig",
    "submitit_pretrain": "SubmitConfig",
    "main_distill": "DistillConfig",
    "submitit_distill": "SubmitConfig",
    "eval_classify": "ClassifyConfig",
    "eval_knn": "KnnConfig",
    "eval_monodepth": "DepthConfig",
    "eval_semseg": "SegmentationConfig",
}


def check_ranges(cls):
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if re.search(r"\b(int|float)\b", str(hints[field.name])) and field.name not in UNBOUNDED:
            assert field.metadata["bounds"], f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize("module", CONFIGS)
def test_every_number_of_every_program_declares_its_range(module):
    for cls in (getattr(importlib.import_module(module), name) for name in CONFIGS[module].split()):
        check_ranges(cls)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_of_every_command_declares_its_range(command):
    check_ranges(COMMANDS[command])


@pytest.mark.parametrize(
    "flags",
    [
        "--clip_grad 0",
        "--clip_grad -1",
        "--mask_ratio 0",
        "--mask_ratio 1",
        "--weight_decay -100",
        "--start_epoch -1",
        "--lr 0",
        "--warmup_epochs -1",
        "--drop_path 1",
        "--num_workers -1",
        "--save_minutes -1",
        "--crop_scale_min 0",
        "--log_freq 0",
        "--seed -1",
        "--mask_grid 0",
    ],
)
def test_flags_that_would_undo_a_training_are_refused_with_the_range(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("main_pretrain").main(flags.split())
    assert stop.value.code == 2
    flag, value = flags.split()
    assert re.search(rf"{flag} must be an? .*, found {value}", capsys.readouterr().err)


def test_help_lists_the_layouts_and_formats(capsys):
    assert "imagenet-tars" in help_of(capsys, "scenes")
    assert "safetensors, transformers" in help_of(capsys, "convert")


def test_help_loads_no_library_that_only_other_commands_need():
    code = """
import sys
from pixio.cli.main import main
try:
    main(["--help"])
except SystemExit:
    heavy = {"matplotlib", "PIL", "webdataset", "timm", "transformers", "pixio.data", "pixio.engine.runtime"}
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("paint", "invalid choice: 'paint'"),
        ("info pixio_vith14", "did you mean pixio_vith16"),
        ("info --all", "--all"),
        ("convert no.pth x.pth --to pth", "here0/no.pth"),
        ("convert no.pth a.png --to timm", "here0/a.png exists"),
        ("convert encoder.pth x.zip --to zip", "--to must be one of pth, safetensors"),
        (
            "convert encoder.pth x.pth --to pth --num_heads two",
            "--num_heads must be a positive integer or none, found two",
        ),
        ("features a.png", "--pretrained"),
        ("features a.png --model pixio_vitx16", "is not an encoder: choose from pixio_vit"),
        ("features no/*.png --model pixio_vitpico16", "here0/no/*.png"),
        ("report run --results nowhere", "here0/nowhere"),
        ("features no.png --model pixio_vitpico16", "here0/no.png"),
        ("features a.png --model pixio_vitpico16 --output f.txt", ".npz or .safetensors"),
        ("features a.png --model pixio_vitpico16 --output no/f.npz", "here0/no to write"),
        (
            "features a.png --pretrained encoder.pth --num_heads 2 --arrays pixels",
            "--arrays must be one of patch_tokens",
        ),
        ("features a.png --pretrained encoder.pth", "pass num_heads"),
        ("features a.png --pretrained encoder.pth --num_heads 2 --size 20", "try 16"),
        ("features a.png --pretrained encoder.pth --num_heads 2 --blocks 7", "2 blocks"),
        ("features a.png --pretrained encoder.pth --num_heads 2 --device abacus", "unknown device"),
        ("pca a.png --pretrained encoder.pth --output no/pca.png", "here0/no to write"),
        ("pca a.png --pretrained encoder.pth --output pca.txt", "must end in .png"),
        ("similarity a.png --pretrained encoder.pth --num_heads 2", "--point"),
        ("similarity a.png --pretrained encoder.pth --num_heads 2 --point 60 5", "outside the image"),
        ("reconstruct a.png --checkpoint encoder.pth", "no decoder"),
        ("reconstruct a.png --checkpoint run/checkpoints/step_00000001 --sweep --output x.pdf", "--sweep"),
        ("reconstruct a.png --checkpoint run/checkpoints/step_00000001 --output x.gif", "--sweep"),
        (
            "reconstruct a.png --checkpoint run/checkpoints/step_00000001 --draws 0",
            "--draws must be a positive integer, found 0",
        ),
        (
            "reconstruct a.png --checkpoint run/checkpoints/step_00000001 --mask_ratio 2",
            "--mask_ratio must be a number of at least 0 and below 1, found 2",
        ),
        ("curves nowhere", "here0/nowhere: No such file"),
        ("report nowhere", "here0/nowhere is no run"),
        ("plan pixio_vitpico16 --gpu_memory 0", "--gpu_memory must be a positive number or none, found 0"),
        ("scenes cifar data", "layout must be one of imagenet-tars"),
    ],
)
def test_a_mistake_gets_one_clear_line(command, message, capsys):
    assert message in fail(capsys, command)


def test_a_missing_library_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    Path("x.safetensors").write_bytes(b"")
    assert "pip install safetensors" in fail(capsys, "features a.png --pretrained x.safetensors")


# ------------------------------------------------------------------------------------------------ commands
def test_info_prints_the_published_sizes(capsys):
    main(["info", "pixio_vith16"])
    assert "631,013,120" in capsys.readouterr().out


def test_a_reader_that_leaves_early_gets_no_complaint():
    command = f"{sys.executable} -m pixio info | head -n 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == done.stderr == ""


def test_convert_prints_the_line_that_loads_the_result(capsys):
    main(shlex.split("convert pico.pth converted.safetensors --to safetensors"))
    converted = eval(capsys.readouterr().out).state_dict()
    source = torch.load("pico.pth", weights_only=True)
    assert converted.keys() == source.keys()
    assert all(torch.equal(converted[key], source[key]) for key in source)


def test_features_of_named_images_are_one_file(here, capsys):
    main(shlex.split("features a.png b.png --pretrained pico.pth --size 32 --output features.npz"))
    assert "2 images -> features.npz" in capsys.readouterr().out
    with np.load("features.npz") as found:
        arrays = dict(found)
    assert {name: array.shape for name, array in arrays.items()} == {
        f"{image}.png/{name}": shape
        for image in "ab"
        for name, shape in (("patch_tokens", (2, 2, 128)), ("embedding", (128,)))
    }
    with torch.inference_mode():
        last = pixio.from_pretrained("pico.pth").forward_features(pixio.transform(32)("b.png"))
    np.testing.assert_allclose(arrays["b.png/embedding"], last["cls_tokens_norm"][0].mean(0), atol=1e-5)


def test_features_of_a_model_by_name_need_no_weights_and_are_repeatable(capsys):
    for name in ("one", "two"):
        main(shlex.split(f"features a.png --model pixio_vitpico16 --size 16 --output {name}.safetensors"))
    assert "random weights" in capsys.readouterr().err
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()


def test_a_model_by_name_takes_a_file_of_another_input_size(capsys):
    torch.save(pixio.pixio_vitpico16(img_size=48, n_cls_tokens=4).state_dict(), "small.pth")
    main(shlex.split("features a.png --model pixio_vitpico16 --pretrained small.pth --output small.npz"))
    with np.load("small.npz") as found:
        assert found["a.png/patch_tokens"].shape == (3, 3, 128)


def test_features_go_on_in_a_folder_and_tell_what_was_there(capsys):
    command = "features *.png --pretrained pico.pth --size 16 --output stored --per_file 1 --arrays embedding"
    main(shlex.split(command))
    assert "2 images -> stored" in capsys.readouterr().out
    main(shlex.split(command))
    assert "0 images -> stored" in (again := capsys.readouterr().out)
    assert "and 2 from before" in again


def test_images_that_cannot_be_read_are_left_out_and_the_exit_status_says_so(here, capsys):
    (here / "bad").mkdir()
    shutil.copy("a.png", "bad/a.png")
    Path("bad/b.png").write_bytes(b"not an image")
    tar = write_tar(here / "bad/c.tar", {"c.png": Path("a.png").read_bytes(), "d.png": b"1" * 2000})
    tar.write_bytes(tar.read_bytes()[:-10_000])  # inside of d.png
    command = "features bad --pretrained pico.pth --size 16 --arrays embedding --output"
    with pytest.warns(UserWarning, match="c.tar: cut off"), pytest.raises(SystemExit) as ended:
        main(shlex.split(f"{command} some"))
    assert ended.value.code == INCOMPLETE
    assert "2 images or tars cannot be read whole, first bad/c.tar: cut off" in capsys.readouterr().err
    lines = [json.loads(line) for line in (here / "some/index.jsonl").read_text().splitlines()]
    assert {line["image"]: "error" in line for line in lines} == {
        "bad/a.png": False,
        "bad/b.png": True,
        "bad/c.tar/c.png": False,
    }
    shutil.rmtree("bad")


@pytest.mark.parametrize(
    "command",
    [
        "pca a.png b.png --foreground --smooth --output out.png",
        "tokens a.png --block 0 --fit pad --output out.svg",
        "similarity a.png b.png --point 59 39 --point 0 0 --output out.png",
    ],
)
def test_pictures_of_features_are_written(command, here, capsys):
    main(shlex.split(f"{command} --pretrained encoder.pth --num_heads 2 --size 64"))
    name = command.split()[-1]
    assert f"-> {name}" in capsys.readouterr().out
    assert (here / name).stat().st_size > 1000
    (here / name).unlink()


def test_reconstruct_curves_and_report_tell_of_a_run(here, capsys):
    main(shlex.split("reconstruct a.png b.png --checkpoint run/checkpoints/step_00000001 --draws 2"))
    main(shlex.split("curves run --output curves.pdf"))
    main(shlex.split("report run --images a.png"))
    assert capsys.readouterr().out.count("->") == 3
    for name in ("reconstruction.png", "curves.pdf", "run/report.html"):
        assert (here / name).stat().st_size > 1000


def test_plan_tells_what_fits(capsys):
    main(shlex.split("plan pixio_vitpico16 --gpus 2 --gpu_memory 80 --batch 2"))
    assert "take --parallel ddp" in capsys.readouterr().out


def test_scenes_are_written_in_a_layout(here, capsys):
    main(shlex.split("scenes pascal tree --train 1 --val 1 --size 16"))
    assert len(list((here / "tree").rglob("*.jpg"))) == 2


def test_doctor_names_what_is_there_and_what_is_missing(tmp_path, capsys, monkeypatch):
    from importlib import metadata

    installed = metadata.version

    def version(name):
        if name == "submitit":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "safetensors" else installed(name)

    monkeypatch.setattr(metadata, "version", version)
    main(["doctor", "--folder", str(tmp_path)])
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["pixio"].startswith(pixio.__version__)
    assert said["torch"] == torch.__version__
    assert re.fullmatch(r"safetensors 0.1 is older than [\d.]+: pip install 'pixio\[cli\]'", said["[cli]"])
    assert "submitit is missing" in said["[train]"]
    assert said["JPEG"].startswith("simplejpeg")
    assert re.search(r"\d MiB/s written to .*, \d.* GiB free", said["disk"])
    assert not list(tmp_path.iterdir())
