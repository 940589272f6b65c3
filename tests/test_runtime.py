"""Devices, precision and the end of a process."""

import dataclasses
import socket
from types import SimpleNamespace

import pytest
import torch
from helpers import ALONE
from test_ranks import SRUN_TASK
from torch import nn

from pixio.engine import ranks as ranks_module
from pixio.engine.ranks import Ranks, find_ranks
from pixio.engine.runtime import Runtime, choose_device, place_frozen, start_runtime


def visible_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "device", "ranks", "message"),
    [
        (0, "cuda", Ranks(), "torch finds no CUDA GPU"),
        (2, "cuda:2", Ranks(), "2 GPUs are visible"),
        (2, "cuda", Ranks(0, 0, 8, 4), "4 processes on a node with 2 visible GPUs.*or choose cpu"),
        (8, "auto", Ranks(0, 0, 4, 2), "2 processes on a node with 8 visible GPUs.*CUDA_VISIBLE_DEVICES"),
        (2, "cuda:1", Ranks(0, 0, 2, 2), "shared by 2 processes"),
        (0, "tpu", Ranks(), "choose auto, cpu, cuda"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(monkeypatch, gpus, device, ranks, message):
    visible_gpus(monkeypatch, gpus)
    with pytest.raises(ValueError, match=message):
        choose_device(device, ranks)


@pytest.mark.parametrize(
    ("gpus", "device", "ranks", "expected"),
    [
        (4, "auto", Ranks(6, 2, 8, 4), "cuda:2"),
        (4, "cuda:3", Ranks(), "cuda:3"),
        (4, "cpu", Ranks(6, 2, 8, 4), "cpu"),
        (0, "auto", Ranks(6, 2, 8, 4), "cpu"),
        (1, "cuda", Ranks(6, 2, 8, 4, one_gpu_each=True), "cuda:0"),
    ],
)
def test_each_rank_gets_its_own_device(monkeypatch, gpus, device, ranks, expected):
    visible_gpus(monkeypatch, gpus)
    assert choose_device(device, ranks) == torch.device(expected)


@pytest.mark.parametrize(
    "option",
    [
        {"SLURM_GPUS_PER_TASK": "1"},
        {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1"},
        {"SLURM_GPU_BIND": "single:1"},
        {"SLURM_NTASKS_PER_GPU": "1"},
    ],
)
def test_tasks_that_see_one_gpu_each_take_it_whatever_made_it_so(monkeypatch, option):
    visible_gpus(monkeypatch, 1)
    assert choose_device("auto", find_ranks(SRUN_TASK | option)) == torch.device("cuda:0")
    wrapper = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "1"}
    assert choose_device("auto", find_ranks(wrapper)) == torch.device("cuda:0")


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="choose bf16 or fp32"):
        start_runtime("cpu", "fp16")


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_computes_in_the_type_asked_for(monkeypatch, dtype, expected):
    monkeypatch.setattr("pixio.engine.runtime._cpu_computes_bf16", lambda: True)
    runtime = start_runtime("cpu", dtype)
    with runtime.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_a_cpu_that_would_emulate_bf16_computes_in_float32_and_says_so(monkeypatch):
    monkeypatch.setattr("pixio.engine.runtime._cpu_computes_bf16", lambda: False)
    with pytest.warns(UserWarning, match="no bf16 arithmetic: computing in float32"):
        assert start_runtime("cpu", "bf16").dtype == torch.float32


@pytest.mark.parametrize(
    ("failure", "left"), [(None, 1), (SystemExit(75), 1), (ValueError("mine"), 0), (KeyboardInterrupt(), 0)]
)
def test_a_failing_process_does_not_wait_for_the_others_to_leave(monkeypatch, failure, left):
    """With NCCL it would, while they wait for it."""
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append(1))
    try:
        try:
            if failure:
                raise failure
        finally:
            dataclasses.replace(ALONE, world_size=2).close()
    except (SystemExit, ValueError, KeyboardInterrupt):
        pass
    assert len(calls) == left


def test_memory_is_a_plausible_number_of_gib():
    assert 0.01 < ALONE.memory() < 1000


def test_compile_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda _: raising("no compiler found\n\nset this and that"))
    with pytest.raises(
        ValueError, match=r"--compile does not work here \(no compiler found\): install"
    ) as found:
        ALONE.wrap(nn.Linear(1, 1), compile=True)
    assert "\n" not in str(found.value)


def test_a_gpu_without_a_compiler_trains_uncompiled_and_says_so(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda _: raising("no compiler found"))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    with pytest.warns(UserWarning, match="not compiled, which costs speed: no compiler found"):
        assert not Runtime(torch.device("cuda"))._compiles(None)
    assert not ALONE._compiles(None)


def raising(text: str):
    def call(*_):
        raise RuntimeError(text)

    return call


class Answers(dict):
    """A store as far as the ranks compare their GPUs, in which the other rank has answered."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def wait(self, keys: list[str]) -> None:
        assert self.keys() >= set(keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key] for key in keys]


def test_ranks_that_share_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(ranks_module.time, "sleep", lambda _: None)
    gpu = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    host = socket.gethostname()
    other = Answers({"gpu/0": f"GPU-0 on {host}".encode()})
    ranks_module._check_gpus(other, Ranks(1, 1, 2, 2), torch.device("cuda:0"))
    same = Answers({"gpu/0": f"GPU-1 on {host}".encode()})
    with pytest.raises(
        ValueError, match=f"ranks 0 and 1 share GPU GPU-1 on {host}: start one process per GPU"
    ):
        ranks_module._check_gpus(same, Ranks(1, 1, 2, 2), torch.device("cuda:0"))


def test_a_frozen_model_in_the_type_of_autocast_gives_the_bits_of_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 5)).eval()
    images, bf16 = torch.randn(2, 3, 4, 4), torch.bfloat16
    runtime = dataclasses.replace(ALONE, dtype=bf16)
    with torch.no_grad(), runtime.autocast():
        expected = model(images)
        found = place_frozen(model, runtime.device, runtime.dtype)(images)
    assert torch.equal(found, expected)
    assert [module.weight.dtype for module in (model[0], model[2], model[3])] == [bf16, torch.float32, bf16]
    assert not any(parameter.requires_grad for parameter in model.parameters())
