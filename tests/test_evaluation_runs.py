"""Dense evaluation end to end on rendered trees: from a command to results, killed, resumed, on two ranks."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import collect_results
import eval_monodepth
import eval_semseg
import launch
import numpy as np
import pytest
import torch
import training_loop
import tuning
import yaml
from dense import training
from dense.data import StepSampler, open_split
from dense.probe import build_probe
from eval_monodepth import DepthConfig
from eval_semseg import SegmentationConfig
from helpers import ALONE, Killed, free_port, interrupt_twice, latest_checkpoint, read_log, run_two_ranks
from PIL import Image

import pixio
from pixio.dense import Predictor
from pixio.engine import signals
from pixio.engine.checkpoint import Checkpoints
from pixio.engine.config import parse
from pixio.engine.lock import lock_folder
from pixio.engine.runtime import Runtime
from pixio.engine.step import NonFiniteLoss
from pixio.models.external import fingerprint
from pixio.synthetic.scenes import render
from pixio.synthetic.trees import write_tree

EVALUATION = Path(eval_semseg.__file__).parent
TUNED = ("--train_blocks", "2", "--encoder_lr", "1e-3", "--epochs", "1")
TINY = """
    --encoder pixio_vitpico16 --device cpu --dtype fp32 --num_workers 0 --crop_size 32 --save_minutes 0
    --epochs 2 --batch_size 1 --batches_per_step 2 --lr 1e-2 --panels 2
"""


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    """ADE20K with 4 + 3 images, and a folder of one's own with depth (PNG and .npy), all 48 pixels high."""
    root = tmp_path_factory.mktemp("trees")
    write_tree("ade20k", root / "ade20k", train=4, val=3, size=48)
    for split, seeds in (("train", range(4)), ("val", range(10, 13))):
        for folder in ("images", "depth"):
            (root / "own" / split / folder).mkdir(parents=True)
        for seed in seeds:
            scene = render(seed, (48, 56))
            Image.fromarray(scene.image).save(root / "own" / split / f"images/{seed}.png")
            depth = root / "own" / split / f"depth/{seed}"
            if seed % 2:
                np.save(f"{depth}.npy", scene.depth)
            else:
                Image.fromarray((scene.depth * 1000).astype(np.uint16)).save(f"{depth}.png")
    return root


def segmentation(trees: Path, output: Path, *flags: str) -> list[str]:
    config = EVALUATION / "semseg/configs/ade20k_linear.yaml"
    data = trees / "ade20k"
    return [*f"--config {config} --data_root {data} --output_dir {output}".split(), *TINY.split(), *flags]


def depth(trees: Path, output: Path, *flags: str) -> list[str]:
    data = f"--dataset folder --data_root {trees / 'own'} --head linear --output_dir {output}"
    return [*data.split(), *TINY.split(), *flags]


def metrics_of(results: dict) -> list[dict]:
    """The evaluations of a run without their times."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in results["evaluations"]]


def assert_alike(found: dict, expected: dict, rel: float, abs: float) -> None:
    """The same evaluations, to rounding."""
    for row, other in zip(metrics_of(found), metrics_of(expected), strict=True):
        iou, other_iou = row.pop("iou", []), other.pop("iou", [])
        assert row == pytest.approx(other, rel=rel, abs=abs)
        for value, other_value in zip(iou, other_iou, strict=True):  # None where a class does not occur
            assert value == (other_value and pytest.approx(other_value, rel=rel, abs=abs))


@pytest.fixture(scope="module")
def segmented(trees, tmp_path_factory) -> tuple[dict, Path]:
    """A finished segmentation run that others are compared with."""
    output = tmp_path_factory.mktemp("segmented")
    return eval_semseg.main(segmentation(trees, output)), output


# --- results ------------------------------------------------------------------------------------------------


def test_a_run_leaves_results_head_panels_and_log(segmented, trees):
    results, output = segmented
    assert json.loads((output / "results.json").read_text()) == results
    assert {"head.pth", "panels.png", "log.jsonl"} < {path.name for path in output.iterdir()}
    assert Image.open(output / "panels.png").width > 500
    assert results["counts"] == {"train": 4, "val": 3}
    assert [row["epoch"] for row in results["evaluations"]] == [1, 2]
    assert results["last"]["miou"] == results["evaluations"][1]["miou"]
    best = max(results["evaluations"], key=lambda row: row["miou"])
    assert results["best"]["miou"] == {"value": best["miou"], "epoch": best["epoch"]}
    assert list(results["per_class"])[:4] == ["wall", "building", "sky", "floor"]
    assert results["per_class"]["building"] == results["evaluations"][1]["iou"][1]
    assert len(results["per_class"]) == 150
    assert results["config"]["lr"] == 1e-2
    assert len(results["encoder_sha256"]) == 64
    assert results["seconds"] > 0


def test_the_head_learns_and_the_encoder_does_not(segmented, trees, tmp_path):
    lines = read_log(segmented[1])
    assert lines[-1]["loss"] < lines[0]["loss"]
    torch.manual_seed(0)
    encoder = pixio.create_model("pixio_vitpico16")
    assert segmented[0]["encoder_sha256"] == fingerprint(encoder)


def test_a_saved_head_gives_its_metrics_again_whatever_the_window_batch(segmented, trees, tmp_path):
    results, output = segmented
    head = ["--head", str(output / "head.pth"), "--eval_only"]
    again = eval_semseg.main(segmentation(trees, tmp_path, *head, "--window_batch", "1"))
    assert_alike(again, results | {"evaluations": results["evaluations"][-1:]}, rel=1e-6, abs=0)


@pytest.mark.parametrize("width", [256, 16])
def test_depth_is_evaluated_on_png_and_npy_with_a_dpt_head(trees, tmp_path, width):
    flags = ["--head", "dpt", "--dpt_width", str(width), "--epochs", "1", "--panels", "1"]
    results = eval_monodepth.main(depth(trees, tmp_path, *flags))
    assert results["blocks"] == [0, 2, 3, 5]
    assert 0 < results["last"]["rmse"] < 10
    assert results["evaluations"][0]["images"] == 3
    assert (tmp_path / "panels.png").is_file()
    state = torch.load(tmp_path / "head.pth")["state"]
    assert state["project.3.weight"].shape[0] == 4 * width
    head = ["--head", str(tmp_path / "head.pth"), "--eval_only"]  # the file says how wide it is
    again = eval_monodepth.main(depth(trees, tmp_path / "again", *head))
    assert again["last"]["rmse"] == pytest.approx(results["last"]["rmse"], rel=1e-6)


def test_evaluations_can_be_rarer_than_epochs_but_the_last_epoch_has_one(trees, tmp_path):
    results = eval_monodepth.main(depth(trees, tmp_path, "--epochs", "3", "--eval_freq", "2"))
    assert [row["epoch"] for row in results["evaluations"]] == [2, 3]


# --- killed and resumed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(segmented, trees, tmp_path, monkeypatch, steps):
    taken = iter(range(100))

    def dying(*arguments):
        if next(taken) == steps:
            raise Killed
        return accumulate(*arguments)

    accumulate = training_loop.accumulate
    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "accumulate", dying)
        patch.setattr(training_loop.Interval, "due", lambda *_: True)  # a checkpoint after every step
        with pytest.raises(Killed):
            eval_semseg.main(segmentation(trees, tmp_path))
    resumed = eval_semseg.main(segmentation(trees, tmp_path))
    assert metrics_of(resumed) == metrics_of(segmented[0])
    heads = [torch.load(folder / "head.pth")["state"] for folder in (segmented[1], tmp_path)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


@pytest.mark.parametrize(
    ("number", "module", "function", "call", "step", "evaluated"),
    [
        (signal.SIGUSR2, training_loop, "accumulate", 1, 1, []),  # in the first step
        (signal.SIGTERM, Predictor, "predict", 2, 2, []),  # between the images of the first evaluation
        (signal.SIGTERM, Predictor, "predict", 5, 4, [1]),  # of the last one
    ],
)
def test_a_signal_saves_what_is_done_and_the_same_command_goes_on(
    segmented, trees, tmp_path, monkeypatch, capsys, number, module, function, call, step, evaluated
):
    calls, original = iter(range(1, 100)), getattr(module, function)

    def signalled(*arguments):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(signals, "_received", set())
        patch.setattr(module, function, signalled)
        with pytest.raises(SystemExit) as stopped:
            eval_semseg.main(segmentation(trees, tmp_path))
    assert stopped.value.code == signals.EXIT_PREEMPTED
    said = f"stopped by {number.name}: saved after step {step} of 4; the same command resumes"
    assert said in capsys.readouterr().out
    saved = latest_checkpoint(tmp_path)
    assert (saved["step"], [row["epoch"] for row in saved["rows"]]) == (step, evaluated)
    assert metrics_of(eval_semseg.main(segmentation(trees, tmp_path))) == metrics_of(segmented[0])


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_step_at_once(trees, tmp_path):
    status, said = interrupt_twice("eval_semseg", "training_loop", segmentation(trees, tmp_path))
    assert status == -signal.SIGINT
    assert "Ctrl-C again exits at once" in said


def test_a_finished_run_is_not_trained_again(segmented, trees, monkeypatch):
    monkeypatch.setattr(training_loop, "accumulate", None)
    assert metrics_of(eval_semseg.main(segmentation(trees, segmented[1]))) == metrics_of(segmented[0])


def test_a_run_of_another_program_in_the_same_folder_is_refused(trees, tmp_path):
    Checkpoints(tmp_path / "checkpoints", ALONE).save(1, {"model": {}})
    with pytest.raises(SystemExit, match="choose another --output_dir"):
        eval_semseg.main(segmentation(trees, tmp_path))


def test_a_run_of_before_an_option_existed_is_resumed(segmented, trees, monkeypatch):
    load_latest = Checkpoints.load_latest

    def load_old(self):
        state = load_latest(self)
        del state["setting"]["apply_exif"]
        return state

    monkeypatch.setattr(Checkpoints, "load_latest", load_old)
    monkeypatch.setattr(training_loop, "accumulate", None)
    assert metrics_of(eval_semseg.main(segmentation(trees, segmented[1]))) == metrics_of(segmented[0])


def test_the_same_command_twice_at_once_is_refused(trees, tmp_path):
    with lock_folder(tmp_path, ALONE), pytest.raises(SystemExit, match=f"{os.getpid()}"):
        eval_semseg.main(segmentation(trees, tmp_path))
    assert not (tmp_path / "results.json").exists()


def test_another_run_in_the_same_folder_is_refused(segmented, trees):
    with pytest.raises(SystemExit, match=r"holds a run with epochs 2, not 3: choose another --output_dir"):
        eval_semseg.main(segmentation(trees, segmented[1], "--epochs", "3"))


# --- ranks --------------------------------------------------------------------------------------------------

TWO_RANKS = """
import os, sys
import torch
torch.set_num_threads(1)
import eval_monodepth, eval_semseg
programs = eval_semseg, eval_monodepth, eval_semseg
for program, port, command in zip(programs, sys.argv[1:4], sys.argv[4:], strict=True):
    os.environ["MASTER_PORT"] = port
    program.main(command.split())
"""


@pytest.fixture(scope="module")
def on_two_ranks(trees, tmp_path_factory) -> Path:
    """Programs on two real ranks, with synchronised BatchNorm; their folders: `masks`, `depth`, `tuned`."""
    folder = tmp_path_factory.mktemp("ranks")
    commands = (
        segmentation(trees, folder / "masks"),
        depth(trees, folder / "depth"),
        segmentation(trees, folder / "tuned", *TUNED),
    )
    ports = [str(free_port()) for _ in commands]
    arguments = [sys.executable, "-c", TWO_RANKS, *ports, *map(" ".join, commands)]
    path = os.pathsep.join([str(EVALUATION), str(EVALUATION.parent)])
    run_two_ranks(arguments, PYTHONPATH=path)
    return folder


def test_two_ranks_train_and_score_segmentation_like_one(segmented, on_two_ranks):
    two = json.loads((on_two_ranks / "masks/results.json").read_text())
    assert two["ranks"] == 2
    assert_alike(two, segmented[0], rel=1e-6, abs=0.02)  # of per cent: a pixel or two on an edge
    heads = [torch.load(folder / "head.pth")["state"] for folder in (segmented[1], on_two_ranks / "masks")]
    torch.testing.assert_close(heads[1], heads[0], rtol=1e-3, atol=1e-4)


def test_two_ranks_train_and_score_depth_like_one(trees, on_two_ranks, tmp_path):
    two = json.loads((on_two_ranks / "depth/results.json").read_text())
    one = eval_monodepth.main(depth(trees, tmp_path))
    assert [row["images"] for row in metrics_of(two)] == [3, 3]  # an odd number: nothing is counted twice
    assert_alike(two, one, rel=1e-4, abs=1e-6)


def test_two_ranks_train_an_encoder_like_one(trees, on_two_ranks, tmp_path):
    eval_semseg.main(segmentation(trees, tmp_path, *TUNED))
    for name, invisible in (("encoder.pth", "norm.bias"), ("head.pth", "norm.running_mean")):
        one, two = (torch.load(folder / name) for folder in (tmp_path, on_two_ranks / "tuned"))
        one, two = (found.get("state", found) for found in (one, two))
        # Adam's first steps are as long for rounding noise as for gradients: most values agree, and none of
        # the final norm's bias, which BatchNorm takes away again
        keys = one.keys() - {invisible}
        assert max((two[key] - one[key]).abs().float().median().item() for key in keys) < 1e-5
    for key in ("loss", "grad_norm"):
        found, expected = ([row[key] for row in read_log(run)] for run in (on_two_ranks / "tuned", tmp_path))
        assert found == pytest.approx(expected, rel=5e-3)


def test_batches_that_the_ranks_cannot_share_are_refused(trees, tmp_path):
    task = eval_monodepth.depth_task(parse(DepthConfig, depth(trees, tmp_path)))
    config = parse(DepthConfig, depth(trees, tmp_path, "--batches_per_step", "8"))
    one = build_probe(config, task, ALONE)
    three = dataclasses.replace(one, runtime=Runtime(torch.device("cpu"), world_size=3))
    with pytest.raises(ValueError, match="8 batches per step cannot be shared by 3 ranks"):
        training.train_head(three, open_split(task.data, config, "train", 32, warns=True))


# --- mistakes -----------------------------------------------------------------------------------------------


def test_a_head_of_another_encoder_is_refused(segmented, trees, tmp_path):
    torch.manual_seed(1)
    torch.save(pixio.create_model("pixio_vitpico16").state_dict(), tmp_path / "other.pth")
    flags = [
        "--head",
        str(segmented[1] / "head.pth"),
        "--eval_only",
        "--pretrained_ckp",
        str(tmp_path / "other.pth"),
    ]
    with pytest.raises(SystemExit, match=r"head\.pth was trained with encoder_sha256 \w+, not \w+"):
        eval_semseg.main(segmentation(trees, tmp_path / "run", *flags))


def test_a_head_of_another_size_is_refused(segmented, trees, tmp_path):
    head = ["--head", str(segmented[1] / "head.pth"), "--eval_only", "--cls_concat", "none"]
    with pytest.raises(SystemExit, match=r"channels 256, not 128; cls_concat mean, not none"):
        eval_semseg.main(segmentation(trees, tmp_path, *head))


def test_a_file_that_is_no_head_is_refused(segmented, trees, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(SystemExit, match=r"file\.pth is not a head\.pth"):
        eval_semseg.main(segmentation(trees, tmp_path, "--head", str(tmp_path / "file.pth"), "--eval_only"))


def test_evaluation_does_not_overwrite_a_training(segmented, trees):
    head = ["--head", str(segmented[1] / "head.pth"), "--eval_only"]
    with pytest.raises(SystemExit, match="choose another --output_dir"):
        eval_semseg.main(segmentation(trees, segmented[1], *head))


def test_a_prediction_that_is_not_finite_names_the_image(trees, tmp_path, monkeypatch):
    monkeypatch.setattr(Predictor, "_averages", lambda _, windows: torch.full_like(windows[:, :1], torch.nan))
    with pytest.raises(SystemExit, match=r"prediction for .*own/val/images/10\.png is not finite"):
        eval_monodepth.main(depth(trees, tmp_path))
    assert not (tmp_path / "results.json").exists()


def test_a_loss_that_is_not_finite_names_the_images(trees, tmp_path, monkeypatch):
    def diverging(*_):
        raise NonFiniteLoss([float("nan")], 0.0)

    monkeypatch.setattr(training_loop, "accumulate", diverging)
    with pytest.raises(SystemExit, match=r"the loss is not finite .* had read .*own/train/images/\d\.png"):
        eval_monodepth.main(depth(trees, tmp_path))


def test_an_unreadable_image_names_the_file(trees, tmp_path):
    for name in ("images/a.png", "images/b.png", "depth/a.png", "depth/b.png"):
        (tmp_path / "own/val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own/val" / name).write_bytes(b"no image")
    (tmp_path / "own/train").symlink_to(trees / "own/train")
    with pytest.raises(SystemExit, match=r"own/val/images/a\.png is not a readable image"):
        eval_monodepth.main(depth(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_targets_that_teach_nothing_end_the_run_before_it_starts(trees, tmp_path, monkeypatch, split):
    shutil.copytree(trees / "own", tmp_path / "own")
    for file in (tmp_path / "own" / split / "depth").iterdir():
        if file.suffix == ".npy":
            np.save(file, np.load(file) * 1000)
        else:
            Image.fromarray(np.full((48, 56), 50_000, np.uint16)).save(file)
    monkeypatch.setattr(training_loop, "accumulate", None)
    with pytest.raises(SystemExit, match=rf"no pixel of \d depth files counts: .*own/{split}/depth/"):
        eval_monodepth.main(depth(tmp_path, tmp_path / "run"))


def test_flags_of_old_launchers_are_accepted(trees, tmp_path, monkeypatch):
    start, asked = launch.start_runtime, {}
    monkeypatch.setattr(
        launch, "start_runtime", lambda *words, **more: asked.update(more) or start(*words, **more)
    )
    flags = ["--local-rank=0", "--port", "29511", "--epochs", "1", "--panels", "0"]
    eval_monodepth.main(depth(trees, tmp_path, *flags))
    assert asked == {"local_rank": 0, "port": 29511, "deterministic": False}


def test_counts_are_a_warning_or_an_error(trees, tmp_path, capsys):
    with pytest.raises(SystemExit, match="ade20k holds 3 val pairs, the published split 2000"):
        eval_semseg.main(segmentation(trees, tmp_path, "--expect_count"))
    eval_semseg.main(segmentation(trees, tmp_path, "--epochs", "1"))
    assert "warning: " in (errors := capsys.readouterr().err)
    assert "holds 4 train pairs, the published split 20210" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--head convolution", "neither linear nor dpt"),
        ("--head linear --eval_only", "--eval_only needs the file of a trained head"),
        ("--head linear --dpt_width 32", "--dpt_width 32 needs --head dpt, found --head linear"),
        ("--epochs 0", "--epochs must be a positive integer, found 0"),
        ("--seed -1", "--seed must be a non-negative integer, found -1"),
        ("--nclass 0", "--nclass must be an integer of at least 1 and of at most 255, found 0"),
        ("--weight_decay -1", "--weight_decay must be a non-negative number, found -1"),
        ("--port 70000", "--port must be an integer of at least 1 and of at most 65535 or none, found 70000"),
        ("--nclass 3", "--nclass is 3, but ade20k has 150 class names"),
        ("--crop_size 8", "windows of 8 pixels are below the patch size, 16 pixels"),
        ("--head nowhere.pth --eval_only", "no weight file at /"),
        ("--encoder pixio_vitpeco16", "did you mean pixio_vitpico16"),
        ("--data_root nowhere", "there is no such folder"),
    ],
)
def test_mistakes_end_with_one_line_that_says_what_to_do(trees, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        eval_semseg.main(segmentation(trees, tmp_path, *flags.split()))
    assert message in str(error.value) + capsys.readouterr().err


def test_an_unknown_key_in_yaml_names_the_nearest(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("dataset: nyuv2\nmax_deph: 10\n")
    with pytest.raises(SystemExit):
        eval_monodepth.main(["--config", str(file)])
    assert "unknown key max_deph" in (errors := capsys.readouterr().err)
    assert "did you mean max_depth" in errors


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch_size", "lr", "expected"),
    [
        ("nyuv2_dpt", 4, 1e-4, {"data_root": "data/nyud", "min_depth": 0.001, "max_depth": 10}),
        ("nyuv2_linear", 4, 2e-4, {"data_root": "data/nyud", "min_depth": 0.001, "max_depth": 10}),
        ("kitti_dpt", 4, 1e-4, {"data_root": "data/kitti", "min_depth": 0.001, "max_depth": 80}),
        ("kitti_linear", 4, 2e-4, {"data_root": "data/kitti", "min_depth": 0.001, "max_depth": 80}),
        ("ade20k_dpt", 2, 1e-4, {"data_root": "data/ade20k", "nclass": 150}),
        ("ade20k_linear", 2, 2e-4, {"data_root": "data/ade20k", "nclass": 150}),
        ("pascal_dpt", 4, 1e-4, {"data_root": "data/pascal", "nclass": 21}),
        ("pascal_linear", 4, 2e-4, {"data_root": "data/pascal", "nclass": 21}),
        ("loveda_dpt", 1, 2e-4, {"data_root": "data/loveda", "nclass": 7}),
        ("loveda_linear", 1, 4e-4, {"data_root": "data/loveda", "nclass": 7}),
    ],
)
def test_recipes_are_the_published_ones(name, batch_size, lr, expected):
    folder, cls = ("semseg", SegmentationConfig) if "nclass" in expected else ("monodepth", DepthConfig)
    config = parse(cls, ["--config", str(EVALUATION / folder / "configs" / f"{name}.yaml")])
    dataset, head = name.split("_")
    expected |= {"dataset": dataset, "head": head, "batch_size": batch_size, "lr": lr, "epochs": 60}
    expected |= {"crop_size": 256, "weight_decay": 0.01, "batches_per_step": 8, "dtype": "bf16"}
    assert {key: getattr(config, key) for key in expected} == expected


def test_there_are_ten_recipes_in_safe_yaml():
    files = sorted(EVALUATION.glob("*/configs/*.yaml"))
    assert len(files) == 10
    assert all(isinstance(yaml.safe_load(file.read_text()), dict) for file in files)


def test_published_steps_per_epoch():
    assert StepSampler(24_231, 4 * 8, 0).steps_per_epoch == 757
    assert StepSampler(2_522, 1 * 8, 0).steps_per_epoch == 315


def test_patch_14_encoders_see_crops_of_a_multiple_of_14(trees, tmp_path, monkeypatch):
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 4, "num_heads": 2}
    monkeypatch.setattr(tuning, "load_encoder", lambda *_: pixio.PixioViT(**sizes))
    results = eval_monodepth.main(depth(trees, tmp_path, "--epochs", "1"))
    assert results["window"] == {"size": 28, "stride": 18}


# --- scripts ------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path) -> dict[str, str]:
    """Environment whose python, torchrun, srun and sbatch only say where and how they were called.

    They fail where a file named in a variable REFUSED is among their arguments.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    script = '#!/usr/bin/env bash\necho "{name} $PWD $*"\n[[ -z "${{REFUSED:-}}" || "$*" != *"$REFUSED"* ]]\n'
    for name in ("python", "torchrun", "srun", "sbatch"):
        (folder / name).write_text(script.format(name=name))
        (folder / name).chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "GPUS"))}
    return clean | {"PATH": f"{folder}:{os.environ['PATH']}"}


CONFIG = "semseg/configs/loveda_dpt.yaml"
CALL = "eval_semseg.py --config {config} --encoder pixio_vitb16 --pretrained_ckp {weights} --epochs 1"


def shell(command: str, folder: Path, environment: dict[str, str]) -> str:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_launch_scripts_run_from_any_folder_and_keep_relative_paths(programs, tmp_path):
    (tmp_path / "w.pth").touch()
    call = CALL.format(config=EVALUATION / CONFIG, weights=tmp_path / "w.pth")
    command = f"bash {EVALUATION}/launch_semseg.sh {EVALUATION / CONFIG} pixio_vitb16 w.pth --epochs 1"
    assert shell(command, tmp_path, programs) == f"python {EVALUATION} {call}"
    weights = f"bash launch_semseg.sh {CONFIG} pixio_vitb16 {tmp_path}/w.pth --epochs 1"
    assert shell(weights, EVALUATION, programs) == f"python {EVALUATION} {call}"
    command = f"bash {EVALUATION}/launch_classify.sh pixio_vitb16 w.pth --probe attentive"
    call = f"eval_classify.py --encoder pixio_vitb16 --pretrained_ckp {tmp_path}/w.pth --probe attentive"
    assert shell(command, tmp_path, programs) == f"python {EVALUATION} {call}"


def test_launch_scripts_use_several_gpus_without_slurm(programs):
    found = shell("GPUS=4 bash launch_monodepth.sh c.yaml pixio_vitb16 none", EVALUATION, programs)
    assert found.startswith(
        f"torchrun {EVALUATION} --standalone --nproc_per_node 4 eval_monodepth.py --config c.yaml"
    )


def test_classification_is_launched_under_slurm_and_asks_for_encoder_and_weights(programs):
    slurm = programs | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(EVALUATION)}
    found = shell("bash launch_classify.sh pixio_vitb16 none --train_blocks 4", EVALUATION, slurm)
    call = "eval_classify.py --encoder pixio_vitb16 --pretrained_ckp none --train_blocks 4"
    assert found == f"srun {EVALUATION} --kill-on-bad-exit=1 python {call}"
    command = ["bash", f"{EVALUATION}/launch_classify.sh", "pixio_vitb16"]
    refused = subprocess.run(command, env=programs, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("usage: launch_classify.sh ENCODER WEIGHTS")


@pytest.mark.parametrize("submitted_from", [".", ".."])
def test_launch_scripts_work_as_slurms_copy(programs, tmp_path, submitted_from):
    (tmp_path / "slurm_script").write_text((EVALUATION / "launch_semseg.sh").read_text())
    slurm = programs | {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "10"}
    slurm |= {"SLURM_SUBMIT_DIR": str((EVALUATION / submitted_from).resolve())}
    command = f"bash {tmp_path}/slurm_script {CONFIG} pixio_vitb16 none --epochs 1"
    found = shell(command, EVALUATION / submitted_from, slurm)
    config = CONFIG if submitted_from == ".." else EVALUATION / CONFIG
    call = CALL.format(config=config, weights="none")
    assert found == f"srun {EVALUATION} --kill-on-bad-exit=1 python {call}"


def test_a_warned_job_that_may_not_be_queued_again_goes_on_to_its_end(programs, tmp_path):
    (tmp_path / "bin/srun").write_text(f"#!/usr/bin/env bash\ntouch {tmp_path}/runs\nsleep 1\nexit 3\n")
    (tmp_path / "bin/scontrol").write_text(f"#!/usr/bin/env bash\ntouch {tmp_path}/refused\nexit 1\n")
    (tmp_path / "bin/scontrol").chmod(0o755)
    command = ["bash", f"{EVALUATION}/launch_knn.sh", "pixio_vitb16", "none"]
    job = subprocess.Popen(command, env=programs | {"SLURM_JOB_ID": "1"})
    while not (tmp_path / "runs").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR2)
    assert job.wait(timeout=60) == 3
    assert (tmp_path / "refused").exists()


ALL = ("monodepth", "kitti", "nyuv2"), ("semseg", "ade20k", "loveda", "pascal")
CONFIGS = [
    (task, f"{task}/configs/{name}_{head}.yaml")
    for task, *names in ALL
    for name in names
    for head in ("dpt", "linear")
]


def test_all_evaluations_are_submitted_with_their_flags(programs, tmp_path):
    (tmp_path / "w.pth").touch()
    flags = {"DENSE_FLAGS": "--epochs\n1", "KNN_FLAGS": "--per_block", "SBATCH_FLAGS": "--account mine"}
    found = shell(f"bash {EVALUATION}/run_all.sh pixio_vitb16 w.pth", tmp_path, programs | flags)
    start = f"sbatch {EVALUATION} --account mine"
    model = f"pixio_vitb16 {tmp_path}/w.pth"
    expected = [f"{start} launch_{task}.sh {config} {model} --epochs 1" for task, config in CONFIGS]
    assert found.splitlines() == [*expected, f"{start} launch_knn.sh {model} --per_block"]


@pytest.mark.parametrize("gpus", [{}, {"GPUS": "2"}])
def test_all_others_run_where_one_evaluation_fails_and_the_script_fails_too(programs, tmp_path, gpus):
    failed = "semseg/configs/loveda_dpt.yaml"
    command = ["bash", f"{EVALUATION}/run_all.sh", "pixio_vitb16", "none"]
    environment = programs | {"REFUSED": failed} | gpus
    result = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f"failed: {failed}\n"
    lines = result.stdout.splitlines()
    assert len(lines) == 11
    assert all(line.startswith("torchrun" if gpus else "sbatch") for line in lines)


# --- the table ----------------------------------------------------------------------------------------------


def test_the_table_shows_runs_beside_published_numbers(segmented, capsys):
    results, output = segmented
    collect_results.main([str(output)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert len({len(row) for row in rows}) == 1
    column = rows[0].index("ADE20K linear")
    found = {row[0]: row[column] for row in rows}
    name = f"pixio_vitpico16 {results['encoder_sha256'][:8]}"
    assert found[f"{name}, last"] == f"{results['last']['miou']:.1f}"
    assert found[f"{name}, best"] == f"{results['best']['miou']['value']:.1f}"
    assert found["Pixio-H/16, published"] == "50.2"
    assert found["DINOv3-H+/16, published"] == "50.3"
    assert rows[-6][rows[0].index("KITTI DPT")] == "2.210/96.7"


def test_a_head_evaluated_again_hides_no_best_metric_and_counts_as_finished(segmented, tmp_path):
    results = json.loads(json.dumps(segmented[0]))
    results["best"]["miou"]["value"] = 98.7
    again = segmented[0] | {"config": segmented[0]["config"] | {"eval_only": True, "epochs": 60}}
    for number, content in enumerate((results, again)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "results.json").write_text(json.dumps(content))
        os.utime(tmp_path / str(number) / "results.json", (number, number))
    found = {kind: cells for (_, kind), cells in collect_results.collect([tmp_path]).items()}
    assert found["best"] == {("ade20k", "linear"): "98.7"}
    assert found["last"] == {("ade20k", "linear"): f"{results['last']['miou']:.1f}"}


def test_the_table_marks_runs_that_are_not_finished_and_refuses_foreign_files(segmented, tmp_path):
    results = json.loads(json.dumps(segmented[0]))
    results["config"]["epochs"] = 60
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "*" in collect_results.to_markdown(collect_results.collect([tmp_path]))
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"results\.json does not hold results"):
        collect_results.main([str(tmp_path)])
