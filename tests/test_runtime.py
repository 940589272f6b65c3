"""Ranks from every launcher, devices, precision and the end of a process."""

import dataclasses

import pytest
import torch
from tiny_training import ALONE, tiny_model
from torch import nn

from pixio.engine.runtime import Ranks, choose_device, expand_node_list, find_ranks, start_runtime

SRUN_TASK = {  # as a task of `srun` on 2 nodes finds them (SLURM 22.05)
    "SLURM_JOB_ID": "4546",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_NODELIST": "n[0-2]",
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],login1", ["n1", "n2", "n3", "n7", "login1"]),
        ("a-[001-004]-ib", ["a-001-ib", "a-002-ib", "a-003-ib", "a-004-ib"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ],
)
def test_node_lists_expand_to_host_names(text, hosts):
    assert expand_node_list(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n[]"])
def test_what_is_no_node_list_is_an_error(text):
    with pytest.raises(ValueError, match="not a SLURM node list"):
        expand_node_list(text)


def test_ranks_of_torchrun():
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert find_ranks(environ) == Ranks(5, 1, 8, 4, "env://")


@pytest.mark.parametrize(
    ("environ", "meeting"),
    [
        ({}, "tcp://head:1234"),
        ({"MASTER_ADDR": "fe80::1"}, "tcp://[fe80::1]:1234"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, "env://"),  # there it is torchrun who listens
    ],
)
def test_processes_of_any_launcher_meet_where_we_can_say_who_is_missing(environ, meeting):
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert find_ranks(given | environ).meeting == meeting


def test_torchrun_inside_srun_wins():
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert find_ranks(SRUN_TASK | environ).world_size == 2


def test_ranks_of_srun_meet_on_the_first_machine_of_the_step():
    ranks = find_ranks(SRUN_TASK)
    assert ranks[:4] == (5, 1, 8, 4)
    assert ranks.meeting.startswith("tcp://n1:")


def test_jobs_and_steps_that_run_side_by_side_meet_at_different_ports():
    others = [{"SLURM_JOB_ID": "4547"}, {"SLURM_STEP_ID": "3"}]
    assert len({find_ranks(SRUN_TASK | other).meeting for other in [{}, *others]}) == 3


def test_address_and_port_of_the_environment_win_under_srun():
    environ = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert find_ranks(SRUN_TASK | environ).meeting == "tcp://head:1234"


def test_a_batch_script_without_srun_runs_alone_and_says_so():
    environ = {"SLURM_JOB_ID": "4546", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    with pytest.warns(UserWarning, match="8 tasks, but this process was not started by srun"):
        assert find_ranks(environ) == Ranks()


def test_ranks_given_as_arguments():
    assert find_ranks({}, 2, 1, "tcp://127.0.0.1:29500") == Ranks(1, 1, 2, 2, "tcp://127.0.0.1:29500")


@pytest.mark.parametrize("arguments", [(), (1, -1, "env://"), (None, None, None)])
def test_without_a_launcher_there_is_one_process(arguments):
    assert find_ranks({}, *arguments) == Ranks()


@pytest.mark.parametrize(
    ("environ", "arguments", "message"),
    [
        ({}, (2, None, None), "needs --local_rank, 0 to 1"),
        ({}, (2, 0, None), "--dist_url"),
        ({}, (2, 2, "tcp://127.0.0.1:29500"), "rank 2 does not exist"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, (4, None, None), "--world_size is 4, but the launcher started 2"),
    ],
)
def test_ranks_that_contradict_each_other_are_an_error(environ, arguments, message):
    with pytest.raises(ValueError, match=message):
        find_ranks(environ, *arguments)


def visible_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "device", "ranks", "message"),
    [
        (0, "cuda", Ranks(), "torch sees no CUDA GPU"),
        (2, "cuda:2", Ranks(), "2 GPUs are visible"),
        (2, "cuda", Ranks(0, 0, 8, 4), "4 processes on a machine with 2 visible GPUs.*or choose cpu"),
        (8, "auto", Ranks(0, 0, 4, 2), "2 processes on a machine with 8 visible GPUs.*CUDA_VISIBLE_DEVICES"),
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


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="choose bf16 or fp32"):
        start_runtime("cpu", "fp16")


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_computes_in_the_type_asked_for(dtype, expected):
    runtime = start_runtime("cpu", dtype)
    with runtime.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_unwrap_finds_the_model_inside_a_compiled_one():
    model = tiny_model()
    assert ALONE.unwrap(torch.compile(ALONE.wrap(model))) is model


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
