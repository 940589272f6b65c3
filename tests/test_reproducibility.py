"""A run is a function of its configuration: the same command gives the same bits."""

import os
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import latest_checkpoint, read_log

import pixio
from pixio.engine import runtime
from pixio.synthetic.trees import write_tree

ROOT = Path(__file__).resolve().parents[1]
SHORT = "--device cpu --dtype fp32 --num_workers 1 --log_freq 1"
TRAIN = f"{SHORT} --input_size 64 --mask_grid 2 --batch_size 4 --drop_path 0.1 --dataset_type imagenet"
TRAIN += " --epochs 3 --iters_per_epoch 1 --warmup_epochs 1 --lr 1e-3 --data_path {folder}/tars"
DENSE = f"{SHORT} --encoder pixio_vitpico16 --crop_size 32 --epochs 1 --batch_size 1 --batches_per_step 2"
DENSE += " --panels 0 --train_blocks 1 --data_root {folder}/ade20k"
COMMANDS = {
    "main_pretrain": f"{TRAIN} --model pixio_vitpico16_enc128x6h4_dec128x2h4",
    "main_distill": f"{TRAIN} --teacher_model pixio_vitpico16 --teacher_pretrained {{folder}}/teacher.pth"
    " --student_models pixio_vitti16",
    "eval_semseg": f"{DENSE} --config {ROOT}/evaluation/semseg/configs/ade20k_linear.yaml",
}
TIMED = ("images_per_second", "data_wait_share", "memory")
AS_COMMANDS = (
    "import importlib, sys\nfor name, *flags in eval(sys.argv[1]): importlib.import_module(name).main(flags)"
)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> Path:
    """Every command, here and in a process whose sets have another order; the folder of their outputs."""
    folder = tmp_path_factory.mktemp("reproducibility")
    write_tree("imagenet-tars", folder / "tars", 12, 0, size=64, per_tar=4)
    write_tree("ade20k", folder / "ade20k", train=4, val=1, size=48)
    torch.save(pixio.pixio_vitpico16(img_size=64).state_dict(), folder / "teacher.pth")

    def commands(run: str) -> list[list[str]]:
        return [
            [name, *shlex.split(flags.format(folder=folder)), "--output_dir", f"{folder}/{run}/{name}"]
            for name, flags in COMMANDS.items()
        ]

    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    arguments = [sys.executable, "-c", threads + AS_COMMANDS, str(commands("other"))]
    with subprocess.Popen(arguments, env=environ) as other:
        for name, *flags in commands("here"):
            import_module(name).main(flags)
    assert other.returncode == 0
    return folder


def tensors_of(value: object) -> list[torch.Tensor]:
    """All tensors inside of dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_two_runs_of_a_command_on_one_machine_are_equal_bit_by_bit(two_runs, name):
    first, second = (two_runs / run / name for run in ("here", "other"))
    for row, other in zip(read_log(first), read_log(second), strict=True):
        assert {**row, **dict.fromkeys(TIMED)} == {**other, **dict.fromkeys(TIMED)}
    saved, also = (tensors_of(latest_checkpoint(run)) for run in (first, second))
    assert len(saved) > 20
    assert all(torch.equal(a, b) for a, b in zip(saved, also, strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_deterministic_kernels_are_asked_for_by_a_flag(name, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(runtime, "_be_deterministic", lambda: asked.append(True))
    for flags in ([], ["--deterministic"]):
        command = [*shlex.split(COMMANDS[name].format(folder=tmp_path / "nothing")), *flags]
        with pytest.raises(SystemExit):
            import_module(name).main([*command, "--output_dir", str(tmp_path / "run")])
    assert asked == [True]


def test_deterministic_kernels_are_those_that_torch_offers(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        runtime.start_runtime("cpu", "fp32", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
