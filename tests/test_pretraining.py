"""Pre-training from the command to the files it leaves: every kind of data, kills, ranks, scripts."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import main_pretrain
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from held_out import HeldOut
from helpers import ALONE, echoing_programs, flags_of_script, full_disk, interrupt_twice
from PIL import Image

import pixio
from pixio.engine import signals
from pixio.engine.checkpoint import Checkpoints, materialize, read_checkpoint
from pixio.engine.runtime import Runtime, start_runtime
from pixio.engine.step import accumulate
from pixio.synthetic.trees import write_tree

ROOT = Path(__file__).resolve().parents[1]
MODEL = "pixio_vitpico16_enc128x6h4_dec128x2h4"
TINY = f"--model {MODEL} --input_size 64 --mask_grid 2 --batch_size 4 --dtype fp32 --drop_path 0.1 --lr 1e-3"
SHORT = "--epochs 3 --iters_per_epoch 2 --warmup_epochs 1 --log_freq 1"
SHORT += " --save_steps 2 --save_freq 0 --num_workers 0"


def run(*flags: str) -> None:
    main_pretrain.main(shlex.split(f"{TINY} {SHORT} --device cpu") + [str(flag) for flag in flags])


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoint_of(folder: Path) -> dict:
    name = (folder / "checkpoints" / "latest").read_text().strip()
    return materialize(read_checkpoint(folder / "checkpoints" / name))


def assert_equal_runs(first: Path, second: Path) -> None:
    for a, b in zip(log_of(first), log_of(second), strict=True):
        for key in ("step", "images", "loss", "lr", "grad_norm"):
            assert a[key] == b[key], (key, a, b)
    one, other = checkpoint_of(first), checkpoint_of(second)
    assert one["step"] == other["step"]
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, list[str]]:
    """Small data of every kind, as the flags that name it."""
    root = tmp_path_factory.mktemp("trees")
    write_tree("imagenet-tars", root / "tars", 24, 0, size=64, per_tar=8)
    write_tree("web-tars", root / "web", 24, 0, size=64, per_tar=8)
    write_tree("imagenet-folders", root / "folders", 16, 0, size=64)
    web = f"--dataset_type webdataset --data_path {root}/web/tars --json_path {root}/web/stats"
    return {
        "imagenet": f"--dataset_type imagenet --data_path {root}/tars".split(),
        "webdataset": f"{web} --soft_sampling --hist_thresh 0.1 --imgres_thresh 64".split(),
        "folder": f"--dataset_type folder --data_path {root}/folders/train".split(),
        "scenes": ["--dataset_type", "scenes"],
    }


@pytest.mark.parametrize("kind", ["imagenet", "webdataset", "folder", "scenes"])
def test_every_kind_of_data_trains_and_leaves_a_loadable_encoder(trees, tmp_path, kind):
    run(*trees[kind], "--output_dir", tmp_path)
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["images"] == 24
    assert rows[0]["lr"] == 0
    assert rows[2]["lr"] == pytest.approx(1e-3)
    assert all(0 < row["loss"] < 3 for row in rows)
    assert json.loads((tmp_path / "config.json").read_text())["dataset_type"] == kind
    encoder = pixio.pixio_vitpico16(tmp_path / "encoder.pth", img_size=64)
    mae = pixio.load_mae(tmp_path / "checkpoints" / "step_00000006")
    assert mae.mask_grid == 2
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, mae.encoder.state_dict()[name]), name


def test_the_held_out_loss_is_that_of_the_saved_model_on_fixed_masks_and_health_is_logged(trees, tmp_path):
    held_out = Path(trees["folder"][-1])
    for name, seed in (("run", 0), ("again", 1)):
        flags = ["--val_data", held_out, "--val_freq", "4", "--log_freq", "5", "--seed", seed]
        run(*trees["imagenet"], *flags, "--output_dir", tmp_path / name)
    rows = log_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 4, 5, 6]
    assert ["held_out_loss" in row for row in rows] == [False, True, False, True]
    assert all(0 < row["health"]["variance"] <= 1 for row in rows)
    for name in ("run", "again"):  # whatever the seed of the run
        mae = pixio.load_mae(tmp_path / name / "checkpoints/step_00000006")
        expected = HeldOut(held_out, mae, 0.75).loss(ALONE, mae, batch_size=64)
        assert log_of(tmp_path / name)[-1]["held_out_loss"] == expected
    with pytest.raises(SystemExit):
        run(*trees["imagenet"], "--val_data", tmp_path / "none", "--output_dir", tmp_path / "fails")


def test_validation_changes_nothing_else(trees, tmp_path):
    run(*trees["imagenet"], "--output_dir", tmp_path / "without")
    run(
        *trees["imagenet"],
        "--val_data",
        trees["folder"][-1],
        "--val_freq",
        "1",
        "--output_dir",
        tmp_path / "with",
    )
    assert_equal_runs(tmp_path / "without", tmp_path / "with")


class Killed(BaseException):
    """Stands for a signal: nothing between the loop and the interpreter may catch it."""


@pytest.mark.parametrize(("kind", "workers", "killed_at"), [("imagenet", 2, 4), ("webdataset", 0, 5)])
def test_resumed_run_equals_uninterrupted_run(trees, tmp_path, monkeypatch, kind, workers, killed_at):
    flags = [*trees[kind], "--num_workers", str(workers), "--accum_iter", "2"]
    run(*flags, "--output_dir", tmp_path / "whole")

    steps = iter(range(killed_at))
    saved = tmp_path / "killed" / "checkpoints" / "step_00000004"

    def accumulate_until_killed(*args):
        if next(steps, None) is None:
            while saved.with_name("latest").read_text().strip() != saved.name:
                time.sleep(0.01)  # it is written in the background
            raise Killed
        return accumulate(*args)

    monkeypatch.setattr(main_pretrain, "accumulate", accumulate_until_killed)
    with pytest.raises(Killed):
        run(*flags, "--output_dir", tmp_path / "killed")
    monkeypatch.undo()
    assert checkpoint_of(tmp_path / "killed")["step"] == 4
    run(*flags, "--output_dir", tmp_path / "killed")
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(
    trees, tmp_path, monkeypatch, number
):
    flags = [*trees["imagenet"], "--save_steps", "0"]
    run(*flags, "--output_dir", tmp_path / "whole")
    steps = iter(range(3))

    def accumulate_signalled(*args):
        if next(steps) == 2:
            os.kill(os.getpid(), number)
        return accumulate(*args)

    monkeypatch.setattr(signals, "_received", set())
    monkeypatch.setattr(main_pretrain, "accumulate", accumulate_signalled)
    with pytest.raises(SystemExit) as stopped:
        run(*flags, "--output_dir", tmp_path / "stopped")
    monkeypatch.undo()
    assert stopped.value.code == signals.EXIT_PREEMPTED
    assert checkpoint_of(tmp_path / "stopped")["step"] == 3
    run(*flags, "--output_dir", tmp_path / "stopped")
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_step_at_once(trees, tmp_path):
    flags = shlex.split(f"{TINY} {SHORT} --device cpu --output_dir {tmp_path}")
    status, said = interrupt_twice("main_pretrain", "main_pretrain", [*flags, *trees["folder"]])
    assert status == -signal.SIGINT
    assert "Ctrl-C again exits at once" in said


def test_a_finished_run_says_so_and_changes_nothing(trees, tmp_path, capsys):
    flags = [*trees["folder"], "--output_dir", tmp_path]
    run(*flags)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run(*flags)
    assert "is finished: 6 of 6 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_loss_that_is_not_finite_ends_the_run_with_the_good_weights_saved(trees, tmp_path, monkeypatch):
    forward = pixio.PixioMAE.forward
    calls = iter(range(100))

    def poisoned(self, *args):
        out = forward(self, *args)
        return out._replace(loss=out.loss * float("nan")) if next(calls) == 3 else out

    monkeypatch.setattr(pixio.PixioMAE, "forward", poisoned)
    with pytest.raises(SystemExit, match="the loss is not finite"):
        run(*trees["folder"], "--output_dir", tmp_path / "stopped")
    monkeypatch.undo()
    state = checkpoint_of(tmp_path / "stopped")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["model"].values())
    # it was a moment's fault: the step is taken again, with its images
    run(*trees["folder"], "--output_dir", tmp_path / "stopped")
    run(*trees["folder"], "--output_dir", tmp_path / "whole")
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")


def test_continuing_from_an_encoder_holds_it_still_while_asked(trees, tmp_path):
    run(*trees["folder"], "--output_dir", tmp_path / "first")
    encoder = torch.load(tmp_path / "first" / "encoder.pth", weights_only=True)
    flags = [
        *trees["folder"],
        "--init_encoder",
        tmp_path / "first" / "encoder.pth",
        "--output_dir",
        tmp_path / "second",
    ]
    run(*flags, "--freeze_encoder_steps", 4, "--save_freq", 1)
    frozen = materialize(read_checkpoint(tmp_path / "second" / "checkpoints" / "step_00000004")["model"])
    final = checkpoint_of(tmp_path / "second")["model"]
    for name, value in encoder.items():
        assert torch.equal(value, frozen[f"encoder.{name}"]), name
    assert not torch.equal(encoder["blocks.0.mlp.fc1.weight"], final["encoder.blocks.0.mlp.fc1.weight"])
    assert not torch.equal(frozen["decoder_pred.weight"], final["decoder_pred.weight"])


def test_a_run_starts_from_a_training_checkpoint_of_the_release(trees, tmp_path, capsys):
    run(*trees["folder"], "--output_dir", tmp_path / "first")
    model = checkpoint_of(tmp_path / "first")["model"]
    file = tmp_path / "checkpoint-3.pth"
    flat = {name.removeprefix("encoder."): value for name, value in model.items()}
    torch.save({"model": flat, "optimizer": {}, "epoch": 3, "args": argparse.Namespace(model=MODEL)}, file)
    for name, flags in {"same": [], "larger": ["--input_size", 96]}.items():
        flags = [*flags, "--init_mae", file, "--lr", 1e-12]
        run(*trees["folder"], "--output_dir", tmp_path / name, *flags)
        said = f"positions of {file} resized from 4 x 4 to 6 x 6 patches"
        assert (said in capsys.readouterr().out) == (name == "larger")
        found = checkpoint_of(tmp_path / name)["model"]
        for key in model.keys() - {"encoder.pos_embed", "decoder_pos_embed"}:
            torch.testing.assert_close(found[key], model[key], rtol=0, atol=1e-9)


def test_two_ranks_train_and_one_process_takes_over(trees, tmp_path):
    """torchrun on a CPU: gloo; programs end, and their workers. The second resumes with fewer ranks."""
    flags = [
        *shlex.split(f"{TINY} {SHORT} --num_workers 1"),
        *trees["imagenet"],
        "--output_dir",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(ROOT / "pretraining" / "main_pretrain.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, script, *flags], check=True, env=environment, timeout=300)
    assert [row["images"] for row in log_of(tmp_path)] == [8, 16, 24, 32, 40, 48]
    assert len(checkpoint_of(tmp_path)["data"]) == 2
    main_pretrain.main([*flags, "--epochs", "4"])
    assert [row["images"] for row in log_of(tmp_path)][-2:] == [52, 56]


def mae_step(rank: int, world_size: int, folder: Path) -> None:
    """Two steps on this rank's share of eight images with fixed masks; rank 0 saves the weights."""
    torch.set_num_threads(1)
    runtime = start_runtime("cpu", "fp32", world_size, rank, f"file://{folder}/rendezvous")
    torch.manual_seed(0)
    mae = pixio.create_model(MODEL, img_size=64, mask_grid=2)
    # Adam would make whole steps of the rounding errors of zero gradients, as those of the key biases
    model, optimizer = runtime.wrap(mae), torch.optim.SGD(mae.parameters(), 0.1)
    images, noise = torch.randn(2, 8, 3, 64, 64), torch.rand(2, 8, 4)
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    for step in range(2):
        batch = (images[step, share], noise[step, share])
        accumulate(
            runtime, model, optimizer, runtime.make_scaler(), [batch], lambda m, b: m(b[0], noise=b[1]).loss
        )
    if rank == 0:
        torch.save(mae.state_dict(), folder / f"{world_size}.pt")
    runtime.close()


def test_two_gloo_ranks_equal_one_process_with_the_double_batch(tmp_path):
    mp.spawn(mae_step, (2, tmp_path), nprocs=2)
    mae_step(0, 1, tmp_path)
    two, one = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (2, 1))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "pixio_vith16"], "not a pre-training model; choose one of"),
        (["--input_size", "72"], "multiples of the patch size 16"),
        (["--input_size", "80"], "mask_grid 2 does not divide the patch grid 5 x 5"),
        (["--dataset_type", "folder", "--data_path", "/nowhere"], "/nowhere"),
        (["--warmup_epochs", "9"], "longer than the run"),
        (["--mask_ratoi", "0.5"], "did you mean --mask_ratio"),
        (["--device", "cuda:7"], "cuda"),
        (["--init_mae", "a.pth", "--init_encoder", "b.pth"], "leave --init_encoder out"),
        (["--init_mae", "/nowhere.pth"], "/nowhere.pth"),
    ],
)
def test_mistakes_are_one_clear_line_and_write_nothing(tmp_path, capsys, flags, message):
    if flags[0] == "--device" and torch.cuda.device_count() > 7:
        pytest.skip("this machine has that device")
    with pytest.raises(SystemExit) as stopped:
        run("--dataset_type", "scenes", "--output_dir", tmp_path / "run", *flags)
    said = f"{stopped.value.code} {capsys.readouterr().err}"
    assert message in said
    assert stopped.value.code not in (0, None)
    assert not (tmp_path / "run").exists()


def test_a_report_that_cannot_be_written_does_not_end_training(trees, tmp_path, capsys):
    (tmp_path / "data_report.json").mkdir()
    run(*trees["folder"], "--output_dir", tmp_path)
    assert checkpoint_of(tmp_path)["step"] == 6
    assert "training continues without data_report.json" in capsys.readouterr().err


def test_a_save_that_fails_beside_training_ends_the_run_before_the_next_is_due(trees, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", full_disk)
    with pytest.raises(SystemExit, match=r"could not save step 3 .*No space left"):
        run(*trees["folder"], "--save_steps", "3", "--epochs", "6", "--output_dir", tmp_path)
    assert 3 <= log_of(tmp_path)[-1]["step"] < 6


def test_a_configuration_that_cannot_be_written_ends_the_run_at_its_start(trees, tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SystemExit, match=r"config\.json"):
        run(*trees["folder"], "--output_dir", tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_another_model_is_not_resumed_into_a_folder(trees, tmp_path):
    run(*trees["folder"], "--output_dir", tmp_path)
    with pytest.raises(SystemExit, match="n_cls_tokens 8, not 4: choose another --output_dir"):
        run(*trees["folder"], "--output_dir", tmp_path, "--n_cls_tokens", "4")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"model": MODEL, "input_size": 128}, "step_00000001 is of a run with input_size 128, not 64"),
        ({"student_models": ["pixio_vitpico16"]}, "step_00000001 is of another kind of run, without model"),
    ],
)
def test_a_checkpoint_of_another_run_is_not_resumed(saved, message, trees, tmp_path):
    Checkpoints(tmp_path, Runtime(torch.device("cpu"))).save(1, {"images": 4, "config": saved})
    with pytest.raises(SystemExit, match=f"{message}: choose another --resume"):
        run(*trees["folder"], "--output_dir", tmp_path / "run", "--resume", tmp_path / "step_00000001")


def test_resume_of_a_weight_file_says_which_flag_takes_it(tmp_path, monkeypatch):
    torch.save({"model": {}, "epoch": 3}, tmp_path / "checkpoint-3.pth")  # as the release's are
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run("--dataset_type", "scenes", "--output_dir", "run", "--resume", "checkpoint-3.pth")
    message = str(caught.value)
    assert f"{tmp_path}/checkpoint-3.pth is a file, --resume takes a folder" in message
    assert "use --init_encoder or --init_mae" in message


def test_other_data_is_refused_or_with_a_flag_read_from_its_beginning(trees, tmp_path, capsys):
    run(*trees["folder"], "--output_dir", tmp_path)
    other = [*trees["imagenet"], "--output_dir", tmp_path, "--epochs", "4"]
    with pytest.raises(SystemExit, match=r"other data .* begin a new epoch \(--new_data"):
        run(*other)
    run(*other, "--new_data")
    assert "The data is not the checkpoint's" in capsys.readouterr().out
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    run(*other, "--epochs", "5", "--new_data")  # the flag may stay: this is the checkpoint's data
    assert "The data is not the checkpoint's" not in capsys.readouterr().out
    optimizer = checkpoint_of(tmp_path)["optimizer"]
    assert {int(moments["step"]) for moments in optimizer["state"].values()} == {10}


def test_without_safetensors_a_run_does_not_begin(trees, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SystemExit, match=r"safetensors.*pixio\[train\]"):
        run(*trees["folder"], "--output_dir", tmp_path)
    assert list(tmp_path.iterdir()) == []


SCRIPTS = sorted((ROOT / "pretraining" / "scripts").glob("*.sh"))


@pytest.fixture
def stubs(tmp_path):
    return echoing_programs(
        tmp_path, IMAGENET_TARS="/data/tars", WEB_TARS="/data/web", WEB_STATS="/data/stats"
    )


def parsed(script: Path, env: dict) -> tuple[main_pretrain.PretrainConfig, dict[str, str]]:
    """The configuration a script asks for, and its launcher flags."""
    flags, launcher = flags_of_script(script, env)
    return main_pretrain.parse(main_pretrain.PretrainConfig, flags), launcher


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_valid_bash_and_their_flags_parse(script, stubs):
    subprocess.run(["bash", "-n", script], check=True)
    config, _ = parsed(script, stubs)
    with torch.device("meta"):
        pixio.create_model(config.model, img_size=config.input_size, mask_grid=config.mask_grid)
    header = script.read_text().split("\nset -e")[0]
    assert all(word in header for word in ("command", "hardware", "hours", "expect"))


@pytest.mark.parametrize(
    ("name", "gpus", "batch", "expected"),
    [
        ("pretrain_pixio_vith16_imagenet", 128, 8192, (400, 40, 4, 8)),
        ("pretrain_pixio_vit5b16_webdata", 256, 16384, (800, 80, 4, 8)),
        ("pretrain_pixio_vith16_ablation", 128, 8192, (400, 40, 2, 4)),
    ],
)
def test_published_recipes_are_the_published_numbers(stubs, name, gpus, batch, expected):
    config, launcher = parsed(ROOT / "pretraining" / "scripts" / f"{name}.sh", stubs)
    assert int(launcher["nodes"]) * int(launcher["ngpus"]) == gpus
    assert config.images_per_step(gpus) == batch
    assert config.peak_lr(gpus) == pytest.approx(8e-4)
    assert (config.epochs, config.warmup_epochs, config.mask_grid, config.n_cls_tokens) == expected
    assert (config.iters_per_epoch, config.drop_path, config.mask_ratio, config.norm_pix_loss) == (
        1605,
        0.4,
        0.75,
        True,
    )
    assert (config.weight_decay, config.crop_scale_min, config.input_size, config.save_freq) == (
        0.05,
        0.2,
        256,
        20,
    )
    if "web" in name:
        assert (config.soft_sampling, config.hist_thresh, config.imgres_thresh) == (True, 4.5, 320)


def test_a_cluster_script_without_a_cluster_says_so(stubs, tmp_path):
    (tmp_path / "sbatch").unlink()
    env = {**stubs, "PATH": str(tmp_path)}
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    script = ROOT / "pretraining" / "scripts" / "pretrain_pixio_vith16_imagenet.sh"
    result = subprocess.run(["/bin/bash", script], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "No SLURM here (sbatch not found)" in result.stderr


@pytest.fixture
def photographs(tmp_path):
    pytest.importorskip("skimage")
    from skimage import data

    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("astronaut", "coffee", "camera"):
        Image.fromarray(np.asarray(getattr(data, name)())).save(folder / f"{name}.png")
    return folder


def test_a_folder_of_real_photographs_trains(photographs, tmp_path):
    run("--dataset_type", "folder", "--data_path", photographs, "--output_dir", tmp_path / "run")
    assert log_of(tmp_path / "run")[-1]["data"] == {"seen": 24, "kept": 24}
