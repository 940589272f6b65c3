"""The engine: ranks, steps, files, configuration and logs, in one process and on two real gloo ranks."""

import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import safetensors.torch
import torch
import torch.multiprocessing as mp
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pixio.engine import checkpoint as checkpoint_module
from pixio.engine import logger as logs_module
from pixio.engine import rendezvous as meeting_module
from pixio.engine.checkpoint import Checkpoints, Interval, fetch, read_checkpoint, restore
from pixio.engine.config import option, parse, save_config
from pixio.engine.logger import Log
from pixio.engine.optim import make_adamw, set_lr
from pixio.engine.rendezvous import Watch
from pixio.engine.runtime import Ranks, Runtime, choose_device, expand_node_list, find_ranks, start_runtime
from pixio.engine.schedule import warmup_cosine
from pixio.engine.step import NonFiniteLoss, accumulate
from pixio.engine.training import TrainConfig, state_to_resume
from pixio.files import write_atomic
from pixio.weights.reading import read_file

ALONE = Runtime(torch.device("cpu"))
STEPS = 3


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def step_images(step: int) -> torch.Tensor:
    """All 8 samples of a step, whatever the number of ranks and micro batches that share them."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- two ranks ----------------------------------------------------------------------------------------------


def run_rank(rank: int, folder: Path) -> None:
    """All that is tried on two ranks, in one start of them; what each found is left in a file."""
    torch.set_num_threads(1)
    runtime = start_runtime("cpu", "fp32", world_size=2, local_rank=rank, dist_url=f"file://{folder}/meeting")
    found = {}

    runtime.seed(7, rank)  # different first weights: rank 0's must reach the other
    model = runtime.wrap(tiny_model() if rank == 0 else nn.Sequential(*tiny_model()).apply(_zero))
    exchanges = []
    model.register_forward_pre_hook(lambda module, _: exchanges.append(module.require_backward_grad_sync))
    optimizer = make_adamw(model, 1e-2)
    scaler = runtime.make_scaler()
    losses = []
    for step in range(STEPS):
        micro_batches = step_images(step)[rank * 4 : rank * 4 + 4].split(2)
        result = accumulate(runtime, model, optimizer, scaler, micro_batches, squares)
        losses.append([result.loss.item(), result.grad_norm.item()])
    found |= {"losses": losses, "weights": weights(model), "exchanges": list(exchanges)}

    before = weights(model)
    moments = json.dumps(optimizer.state_dict()["state"], default=torch.Tensor.tolist)
    images = torch.full((2, 6), math.nan if rank == 1 else 1.0)
    try:
        accumulate(runtime, model, optimizer, scaler, [images], squares)
    except NonFiniteLoss as error:
        found["refused"] = (str(error), error.losses)
    found["unchanged"] = equal(before, weights(model)) and moments == json.dumps(
        optimizer.state_dict()["state"], default=torch.Tensor.tolist
    )

    found["mean"] = runtime.mean(torch.tensor([float(rank), 10.0])).tolist()
    found["any"] = [runtime.any(False), runtime.any(rank == 1)]
    found["gathered"] = runtime.gather({"rank": rank})
    runtime.seed(1, 2)
    found["random"] = torch.rand(4).tolist()

    checkpoints = Checkpoints(folder / "run", runtime)
    found["empty"] = checkpoints.load_latest()
    checkpoints.save(1, {"value": rank})
    found["loaded"] = checkpoints.load_latest()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(shutil, "disk_usage", full_disk)
        try:
            checkpoints.save(2, {"value": torch.ones(8)})
        except OSError as error:
            found["full"] = str(error)
    found["after"] = checkpoints.load_latest()
    try:
        checkpoints.save(2, {}, {folder / "export": lambda state: state["absent"]})
    except OSError as error:
        found["export"] = str(error)
    found |= meet_damage(rank, checkpoints, folder)

    found["due"] = []
    with pytest.MonkeyPatch.context() as patch:
        now = 0.0
        patch.setattr(checkpoint_module, "time", SimpleNamespace(monotonic=lambda: now))
        interval = Interval(runtime, steps=4, minutes=1)
        for step, seconds in ((1, 30.0), (2, 61.0), (3, 62.0), (4, 63.0)):
            now = seconds if rank == 0 else 1e6 * step  # rank 1's clock would always say yes
            found["due"].append(interval.due(step))
    torch.save(found, folder / f"rank{rank}.pt")
    runtime.close()


def meet_damage(rank: int, checkpoints: Checkpoints, folder: Path) -> dict:
    """What each rank says when only one of them cannot read."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(checkpoints, "_newest", lambda: (folder / "nowhere").stat())
        with pytest.raises(ValueError, match="No such file") as caught:
            checkpoints.load_latest()
        found["unlisted"] = str(caught.value)
    other = Checkpoints(folder / "other", checkpoints.runtime)
    other.save(1, {"value": torch.ones(3)})
    empty = Checkpoints(folder / "empty", checkpoints.runtime)
    config = TrainConfig(resume=str(folder / "other" / "step_00000001"))
    with pytest.MonkeyPatch.context() as patch:
        summed, real = [], checkpoint_module.checksum
        patch.setattr(checkpoint_module, "checksum", lambda file: (summed.append(file.name), real(file))[1])
        found["resumed"] = fetch(state_to_resume(config, empty, ()))
        found["summed"] = list(summed)
        if rank == 1:
            patch.setattr(
                checkpoint_module.zipfile, "ZipFile", lambda *_: (_ for _ in ()).throw(OSError("bad"))
            )
        with pytest.raises(ValueError, match="bad") as caught:
            state_to_resume(config, empty, ())
        found["unreadable"] = str(caught.value)
    return found


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


def full_disk(folder) -> SimpleNamespace:
    return SimpleNamespace(free=3)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two_ranks")
    mp.spawn(run_rank, (folder,), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_with_micro_batches_equal_one_process_with_the_whole_batch(two_ranks):
    model = tiny_model()
    optimizer = make_adamw(model, 1e-2)
    for step in range(STEPS):
        result = accumulate(ALONE, model, optimizer, ALONE.make_scaler(), [step_images(step)], squares)
        for found in two_ranks:
            expected = [result.loss.item(), result.grad_norm.item()]
            assert found["losses"][step] == pytest.approx(expected, rel=1e-5)
    for found in two_ranks:
        torch.testing.assert_close(found["weights"], weights(model), rtol=1e-4, atol=1e-6)
    assert equal(two_ranks[0]["weights"], two_ranks[1]["weights"])


def test_ranks_exchange_gradients_with_the_last_micro_batch_only(two_ranks):
    assert [found["exchanges"] for found in two_ranks] == [[False, True] * STEPS] * 2


def test_a_loss_that_is_nan_on_one_rank_ends_the_step_on_both(two_ranks):
    for found in two_ranks:
        message, losses = found["refused"]
        assert "rank 1: nan" in message
        assert math.isfinite(losses[0])
        assert math.isnan(losses[1])


def test_a_refused_step_leaves_weights_and_optimizer_as_they_were(two_ranks):
    assert all(found["unchanged"] for found in two_ranks)


def test_collectives_give_every_rank_the_same_answer(two_ranks):
    for found in two_ranks:
        assert found["mean"] == [0.5, 10.0]
        assert found["any"] == [False, True]
        assert found["gathered"] == [{"rank": 0}, {"rank": 1}]


def test_ranks_draw_different_random_numbers(two_ranks):
    assert two_ranks[0]["random"] != two_ranks[1]["random"]


def test_rank_0_writes_what_every_rank_loads(two_ranks):
    for found in two_ranks:
        assert found["empty"] is None
        assert found["loaded"] == {"value": 0, "step": 1}


def test_a_full_disk_on_rank_0_is_reported_by_every_rank(two_ranks):
    for found in two_ranks:
        assert "No space left" in found["full"]
        assert found["after"] == found["loaded"]


def test_a_failed_export_on_rank_0_is_reported_by_every_rank(two_ranks):
    assert all("'absent'" in found["export"] for found in two_ranks)


def test_what_one_rank_cannot_read_is_reported_by_every_rank(two_ranks):
    for name in ("unlisted", "unreadable"):
        assert two_ranks[0][name] == two_ranks[1][name]


def test_each_rank_verifies_its_share_of_the_checkpoint_of_another_run(two_ranks):
    assert [found["summed"] for found in two_ranks] == [["rank_00000.safetensors"], []]
    assert all(torch.equal(found["resumed"]["value"], torch.ones(3)) for found in two_ranks)


def test_an_interval_follows_the_clock_of_rank_0(two_ranks):
    # Due neither after 30 s nor 1 s after the time it was, but after 61 s, and then by the step.
    assert [found["due"] for found in two_ranks] == [[False, True, False, True]] * 2


# --- the step -----------------------------------------------------------------------------------------------


def test_infinite_gradients_of_a_finite_loss_are_refused():
    model = tiny_model()
    optimizer = make_adamw(model, 1e-2)
    before = weights(model)
    with pytest.raises(NonFiniteLoss, match="gradients are not finite"):
        accumulate(
            ALONE,
            model,
            optimizer,
            ALONE.make_scaler(),
            [torch.ones(2, 6)],
            lambda m, x: (m(x) * 0).sum().sqrt(),
        )
    assert equal(before, weights(model))


def test_fp16_skips_a_step_with_infinite_gradients_and_lowers_its_scale():
    runtime = dataclasses.replace(ALONE, dtype=torch.float16)
    model, scaler = tiny_model(), runtime.make_scaler()
    optimizer = make_adamw(model, 1e-2)
    before = weights(model)
    # A scale of 2**16 times this slope leaves even the range of float32.
    result = accumulate(
        runtime, model, optimizer, scaler, [torch.ones(2, 6)], lambda m, x: 1e36 * m(x).float().mean()
    )
    assert result.loss.isfinite()
    assert not result.grad_norm.isfinite()
    assert equal(before, weights(model))
    assert scaler.get_scale() == 2.0**15


def test_the_scaler_is_transparent_outside_fp16():
    assert not ALONE.make_scaler().is_enabled()
    assert not dataclasses.replace(ALONE, dtype=torch.bfloat16).make_scaler().is_enabled()


def test_clipping_limits_the_gradient_and_reports_its_norm_before():
    results = {}
    for clip in (None, 0.01):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = weights(model)
        result = accumulate(
            ALONE, model, optimizer, ALONE.make_scaler(), [step_images(0)], squares, clip_grad=clip
        )
        moved = torch.cat([(a - b).flatten() for a, b in zip(before, weights(model), strict=True)]).norm()
        results[clip] = (result.grad_norm.item(), moved.item())
    assert results[None][0] == pytest.approx(results[None][1], rel=1e-5)
    assert results[0.01] == pytest.approx((results[None][0], 0.01), rel=1e-3)


def test_a_step_without_micro_batches_is_an_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="at least one micro batch"):
        accumulate(ALONE, model, make_adamw(model, 1.0), ALONE.make_scaler(), [], squares)


def test_random_numbers_are_a_function_of_seed_and_step():
    draws = []
    for seed, step in ((0, 5), (0, 6), (1, 5), (0, 5)):
        ALONE.seed(seed, step)
        draws.append(torch.rand(8).tolist())
    assert draws[0] == draws[3]
    assert draws[0] != draws[1]
    assert draws[0] != draws[2]


# --- optimizer and schedule ---------------------------------------------------------------------------------


def test_only_biases_and_vectors_escape_weight_decay():
    model = tiny_model()
    model.register_parameter("mask_token", nn.Parameter(torch.zeros(1, 1, 8)))
    model.register_parameter("frozen", nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    model.add_module("odd", nn.ParameterDict({"bias": nn.Parameter(torch.zeros(2, 2))}))
    optimizer = make_adamw(model, 1e-3, weight_decay=0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decays == {
        "mask_token": 0.3,
        "0.weight": 0.3,
        "3.weight": 0.3,
        "0.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
        "3.bias": 0.0,
        "odd.bias": 0.0,
    }


def test_a_shared_parameter_is_optimised_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = make_adamw(model, 1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_a_wholly_frozen_model_cannot_be_optimised():
    with pytest.raises(ValueError, match="nothing to optimise"):
        make_adamw(tiny_model().requires_grad_(False), 1e-3)


def test_set_lr_reaches_every_group():
    optimizer = make_adamw(tiny_model(), 1e-3)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 2.0),
        (4, 8.0),
        (5, 7.0 * 0.5 * (1 + math.sqrt(0.5)) + 1.0),
        (6, 4.5),
        (8, 1.0),
        (99, 1.0),
    ],
)
def test_warmup_cosine_matches_values_worked_out_by_hand(step, expected):
    assert warmup_cosine(step, 8.0, 1.0, 4, 8) == pytest.approx(expected)


@given(st.integers(0, 1000), st.integers(1, 1000), st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
def test_warmup_cosine_rises_to_the_peak_without_a_jump_and_falls_to_the_end(warmup, rest, peak, share):
    end, total = peak * share, warmup + rest
    rates = [warmup_cosine(step, peak, end, warmup, total) for step in range(total + 1)]
    assert rates[warmup] == pytest.approx(peak)
    assert rates[-1] == end
    assert all(0.0 <= rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    largest_step = max(peak / max(warmup, 1), (peak - end) * math.pi / 2 / rest)
    assert all(abs(a - b) <= largest_step * (1 + 1e-6) for a, b in itertools.pairwise(rates))


def test_a_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match="warm-up of 9 steps does not fit a run of 8"):
        warmup_cosine(0, 1.0, 0.0, 9, 8)


# --- ranks and devices --------------------------------------------------------------------------------------

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


HANG = """
import sys, time
import torch
from torch import nn
from pixio.engine.optim import make_adamw
from pixio.engine.runtime import start_runtime
from pixio.engine.step import accumulate

rank, world_size, port, minutes, instant = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
try:
    place = f"tcp://127.0.0.1:{port}"
    runtime = start_runtime("cpu", "fp32", world_size, rank, place, timeout_minutes=float(minutes))
except OSError as error:
    sys.exit(str(error))

def hang(when):
    if rank == 1 and instant == when:
        time.sleep(300)

def loss_fn(model, batch):
    hang("forward")
    return model(batch).square().mean()

model = nn.Linear(2, 2)
optimizer = make_adamw(model, 1e-2)
wrapped = runtime.wrap(model)
for step in range(2):
    hang("data")
    accumulate(runtime, wrapped, optimizer, runtime.make_scaler(), [torch.ones(2, 2)], loss_fn)
    runtime.any(False)
hang("end")
runtime.close()
"""


def run_ranks(
    started: int, world_size: int, minutes: float, instant: str, first: int = 0
) -> list[tuple[int, str]]:
    """Exit status and last words of each of the ranks that are started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(word) for word in (world_size, port, minutes, instant)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", HANG, str(rank), *words], stderr=subprocess.PIPE, text=True)
        for rank in range(first, first + started)
    ]
    try:
        return [(rank.wait(timeout=120), rank.stderr.read()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("instant", ["data", "forward"])
def test_a_rank_that_hangs_is_named_and_ends_all(instant):
    """Before its step, or in the middle of it, while the other waits to exchange gradients."""
    for status, said in run_ranks(2, 2, 0.1, instant):
        assert status == 1
        assert "have waited 0.1 minutes for rank 1 of 2" in said
        assert socket.gethostname() in said


def test_ranks_that_do_not_come_are_named():
    first, second = run_ranks(2, 4, 0.1, "never")
    assert (first[0], second[0]) == (1, 1)
    assert "ranks 2, 3 of 4 did not come" in first[1]
    assert "ranks 2, 3 of 4 did not come" in second[1] or "rank 0 has left" in second[1]


def test_a_rank_that_cannot_reach_the_first_says_where_it_looked():
    ((status, said),) = run_ranks(1, 2, 0.02, "never", first=1)
    assert status == 1
    assert "rank 1 cannot reach rank 0 at tcp://127.0.0.1:" in said


def test_ranks_that_only_end_at_different_times_are_not_mistaken_for_missing():
    assert [status for status, _ in run_ranks(2, 2, 0.1, "never")] == [0, 0]


class Notes(dict):
    """A store as far as `Watch` uses one."""

    get = dict.__getitem__

    def clone(self) -> "Notes":
        return self

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_a_run_that_was_suspended_as_a_whole_is_not_mistaken_for_a_hanging_one(monkeypatch):
    hours, ended = itertools.count(step=3600), []
    clock = SimpleNamespace(monotonic=lambda: next(hours), sleep=lambda _: None)
    monkeypatch.setattr(meeting_module, "time", clock)
    monkeypatch.setattr(os, "_exit", ended.append)
    watch = Watch(Notes({"host/1": b"n1", "passed/1": b"-1"}), 0, 2, timedelta(seconds=2))
    time.sleep(0.9)  # it has looked four times
    watch.close()
    assert not ended


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


# --- files --------------------------------------------------------------------------------------------------

KILL_AND_STARVE = """
import os, resource, shutil, signal, sys
from pathlib import Path
import safetensors.torch
import torch
from pixio.engine import checkpoint
from pixio.engine.runtime import Runtime

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def child(folder, act):
    pid = os.fork()
    if pid == 0:
        checkpoints = checkpoint.Checkpoints(folder, Runtime(torch.device("cpu")))
        checkpoints.save(1, {"value": torch.ones(3)})
        act(checkpoints)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def while_writing(checkpoints):
    def save_file(tensors, path, **_):
        Path(path).write_bytes(b"half")
        die()
    safetensors.torch.save_file = save_file
    checkpoints.save(2, {"value": torch.ones(3)})

def before_completing(checkpoints):
    torch.save = die
    checkpoints.save(2, {"value": torch.ones(3)})

def before(target):
    real = os.replace
    def act(checkpoints):
        os.replace = lambda source, goal: die() if Path(goal).name == target else real(source, goal)
        checkpoints.save(2, {"value": torch.ones(3)})
    return act

def starve(checkpoints):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    try:
        checkpoints.save(2, {"value": torch.ones(2**20)})
    except OSError as error:
        (checkpoints.folder / "message").write_text(str(error))

def while_removing(checkpoints):
    checkpoints.keep_newest = 1
    shutil.rmtree = die
    checkpoints.save(2, {"value": torch.ones(3)})

root = Path(sys.argv[1])
for name, act in {"while_writing": while_writing, "before_completing": before_completing,
                  "before_renaming": before("step_00000002"), "before_pointing": before("latest"),
                  "while_removing": while_removing}.items():
    assert os.WTERMSIG(child(root / name, act)) == signal.SIGKILL
assert child(root / "starved", starve) == 0
"""


@pytest.fixture(scope="module")
def mistreated(tmp_path_factory) -> Path:
    """Folders of runs that were killed at several instants of a save, and of one whose disk refused."""
    root = tmp_path_factory.mktemp("mistreated")
    subprocess.run([sys.executable, "-c", KILL_AND_STARVE, str(root)], check=True, timeout=120)
    return root


INSTANTS = ["while_writing", "before_completing", "before_renaming", "before_pointing", "while_removing"]


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_kill_during_a_save_leaves_the_newest_complete_checkpoint(mistreated, instant):
    state = fetch(Checkpoints(mistreated / instant, ALONE).load_latest())
    assert state["step"] == (2 if instant == "while_removing" else 1)
    assert torch.equal(state["value"], torch.ones(3))


@pytest.mark.parametrize("instant", INSTANTS)
def test_what_a_kill_left_is_removed_by_the_next_save(mistreated, tmp_path, instant):
    shutil.copytree(mistreated / instant, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", ALONE, keep_newest=5)
    assert list(checkpoints.folder.glob(".*.tmp"))
    checkpoints.save(3, {})
    assert not list(checkpoints.folder.glob(".*.tmp"))


def test_a_disk_that_refuses_is_reported_and_costs_nothing(mistreated):
    folder = mistreated / "starved"
    message = (folder / "message").read_text()
    assert "File too large" in message
    assert "0.004 GiB needed" in message
    assert not list(folder.glob(".*.tmp"))
    assert Checkpoints(folder, ALONE).load_latest()["step"] == 1


def saved_steps(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.glob("step_*"))


def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep_newest=2, keep_every=40)
    for step in range(10, 101, 10):
        checkpoints.save(step, {})
    assert saved_steps(checkpoints) == [f"step_{step:08d}" for step in (40, 80, 90, 100)]


def test_nothing_is_pruned_before_the_new_checkpoint_is_pointed_to(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, ALONE, keep_newest=1)
    checkpoints.save(1, {})
    real = os.replace

    def refuse_the_pointer(source, goal):
        if Path(goal).name == "latest":
            raise PermissionError("no pointer today")
        real(source, goal)

    monkeypatch.setattr(os, "replace", refuse_the_pointer)
    with pytest.raises(OSError, match="no pointer today"):
        checkpoints.save(2, {})
    assert checkpoints.load_latest()["step"] == 1


def test_a_checkpoint_has_its_name_on_the_disk_before_it_is_pointed_to(tmp_path, monkeypatch):
    seen, real = [], os.fsync

    def note(file):
        if os.path.samestat(os.fstat(file), tmp_path.stat()):
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
        real(file)

    monkeypatch.setattr(os, "fsync", note)
    Checkpoints(tmp_path, ALONE).save(1, {})
    assert seen == [["step_00000001"], ["latest", "step_00000001"]]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_new_one(tmp_path, monkeypatch):
    """Network file systems keep the folder of files that somebody has open."""
    checkpoints = Checkpoints(tmp_path, ALONE, keep_newest=1)

    def refuse(*_, **__):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        for step in (1, 2, 3):
            checkpoints.save(step, {"value": torch.ones(3)})
    assert checkpoints.load_latest()["step"] == 3
    checkpoints.save(4, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000004"]


def test_what_a_kill_left_of_an_export_is_removed_by_the_next_save(tmp_path):
    (tmp_path / ".encoder.pth.12345.tmp").write_bytes(b"half")
    Checkpoints(tmp_path / "run", ALONE).save(1, {}, {tmp_path / "encoder.pth": lambda state: state})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.pth", "run"]


def test_what_is_written_leaves_memory_before_something_is_exported(tmp_path, monkeypatch):
    copies, alive, real = [], [], checkpoint_module.write_tensors

    def note(folder, tensors, group):
        copies.extend(map(weakref.ref, tensors.values()))
        return real(folder, tensors, group)

    def export(state):
        alive.extend(copy() is not None for copy in copies)
        return {}

    monkeypatch.setattr(checkpoint_module, "write_tensors", note)
    Checkpoints(tmp_path, ALONE).save(1, {"value": torch.ones(3)}, {tmp_path / "export": export})
    assert alive == [False]


def test_no_rank_describes_the_parts_of_all_to_all(tmp_path, monkeypatch):
    """With hundreds of ranks and thousands of tensors that takes minutes."""
    name = "torch.distributed.checkpoint.default_planner.create_default_global_save_plan"
    monkeypatch.setattr(name, lambda *_: pytest.fail("parts of all ranks are compared"))
    Checkpoints(tmp_path, ALONE).save(1, {"value": torch.ones(3)})


def test_going_back_by_the_pointer_never_prunes_the_step_just_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep_newest=2)
    for step in (10, 20, 30):
        checkpoints.save(step, {})
    (tmp_path / "latest").write_text("step_00000020\n")
    checkpoints.save(25, {})
    assert checkpoints.load_latest()["step"] == 25
    assert "step_00000020" in saved_steps(checkpoints)


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, ALONE, keep_newest=2, keep_every=1)
    for step in (10, 20):
        checkpoints.save(step, {"attempt": 1})
    pointed_to = []
    real = os.replace
    monkeypatch.setattr(
        os, "replace", lambda *names: (pointed_to.append(checkpoints.load_latest()["attempt"]), real(*names))
    )
    checkpoints.save(20, {"attempt": 2})
    assert set(pointed_to) == {1, 2}  # at no instant does the pointer lead nowhere
    assert checkpoints.load_latest()["attempt"] == 2
    assert len(saved_steps(checkpoints)) == 2
    checkpoints.save(20, {"attempt": 3})
    assert checkpoints.load_latest()["attempt"] == 3
    assert len(saved_steps(checkpoints)) == 2


def test_a_checkpoint_without_a_pointer_is_found(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(7, {})
    (tmp_path / "latest").unlink()
    assert checkpoints.load_latest()["step"] == 7


def test_whoever_may_read_new_files_may_read_a_checkpoint(tmp_path):
    Checkpoints(tmp_path / "run", ALONE).save(1, {"value": torch.ones(3)})
    (tmp_path / "new").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "run/step_00000001").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("name", ["encoder.pth", "checkpoints"])
def test_what_is_no_checkpoint_is_told_what_one_is(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    torch.save({}, tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match=rf"{name} .*holds no state\.pt; a checkpoint is a folder"):
        read_checkpoint(tmp_path / name)


def test_optimizer_and_model_state_come_back_equal(tmp_path):
    model = tiny_model()
    optimizer = make_adamw(model, 1e-2)
    accumulate(ALONE, model, optimizer, ALONE.make_scaler(), [step_images(0)], squares)
    Checkpoints(tmp_path, ALONE).save(1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    state = Checkpoints(tmp_path, ALONE).load_latest()

    other = tiny_model().apply(_zero)
    resumed = make_adamw(other, 1e-2)
    restore(other, resumed, state)
    for network, stepper in ((model, optimizer), (other, resumed)):
        accumulate(ALONE, network, stepper, ALONE.make_scaler(), [step_images(1)], squares)
    assert equal(weights(model), weights(other))


def test_a_resumed_optimizer_keeps_the_settings_of_its_run(tmp_path):
    model = tiny_model()
    optimizer = make_adamw(model, 1e-2, weight_decay=0.1)
    accumulate(ALONE, model, optimizer, ALONE.make_scaler(), [step_images(0)], squares)
    Checkpoints(tmp_path, ALONE).save(1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = make_adamw(model, 1e-2, weight_decay=0.3)
    restore(model, resumed, Checkpoints(tmp_path, ALONE).load_latest())
    assert {group["weight_decay"] for group in resumed.param_groups} == {0, 0.3}
    assert all(state["step"] == 1 for state in resumed.state.values())


def test_an_optimizer_of_other_groups_is_refused(tmp_path):
    model = tiny_model()
    one = torch.optim.AdamW(model.parameters(), 1e-2)
    Checkpoints(tmp_path, ALONE).save(1, {"model": model.state_dict(), "optimizer": one.state_dict()})
    with pytest.raises(ValueError, match="groups of 6 parameters, expected "):
        restore(model, make_adamw(model, 1e-2), Checkpoints(tmp_path, ALONE).load_latest())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.find(b"values")] ^= 1  # not of the padding between parts; the last where nothing is named
    path.write_bytes(content)


def lead_outside(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["files"] = [(f"../{path.parent.name}/{name}", *rest) for name, *rest in content["files"]]
    torch.save(content, path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *itertools.product(("state.pt", "rank_00000.safetensors"), (truncate, flip_a_bit, Path.unlink)),
        ("state.pt", lead_outside),
        (".", shutil.rmtree),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_not_replaced_in_silence(tmp_path, file, damage):
    checkpoints = Checkpoints(tmp_path, ALONE)
    for step in (10, 20):
        checkpoints.save(step, {"value": torch.full((64,), 1.25)})
    damage(tmp_path / "step_00000020" / file)
    with pytest.raises(ValueError, match=r"step_00000020 |no checkpoint at .*step_00000020\.") as caught:
        checkpoints.load_latest()
    assert "go on from step_00000010, write" in str(caught.value)


def link_outside(folder: Path, content: dict) -> None:
    file = folder / content["files"][0][0]
    file.rename(folder.parent / "secret.safetensors")
    file.symlink_to(folder.parent / "secret.safetensors")


def name_outside(folder: Path, content: dict) -> None:
    (folder / content["files"][0][0]).rename(folder.parent / "secret.safetensors")
    content["files"] = [("../secret.safetensors", *content["files"][0][1:])]


def overlap(folder: Path, content: dict) -> None:
    content["chunks"]["model/a"] = torch.tensor([[0, 0, 32], [0, 0, 32]])


def ask_for_a_petabyte(folder: Path, content: dict) -> None:
    content["values"]["model"]["a"] = torch.empty(2**48, device="meta")
    content["chunks"]["model/a"] = torch.tensor([[0, 0, 2**48]])


def give_one_name_twice(folder: Path, content: dict) -> None:
    tensor = torch.empty(16, device="meta")
    content["values"] = {"model": {"b": {"c": tensor}, "b/c": tensor}}
    content["chunks"]["model/b/c"] = torch.tensor([[0, 0, 16]])


def name_no_file(folder: Path, content: dict) -> None:
    content["chunks"]["model/a"] = torch.tensor([[7, 0, 64]])


@pytest.mark.parametrize(
    ("mischief", "message"),
    [
        (link_outside, "leads out of"),
        (name_outside, "leads out of"),
        (overlap, "model/a are missing or overlap"),
        (ask_for_a_petabyte, "cannot lie in files of"),
        (give_one_name_twice, "have one name"),
        (name_no_file, "model/a are missing or overlap"),
    ],
)
def test_a_checkpoint_of_a_stranger_reads_no_other_file_and_leaves_nothing_unset(tmp_path, mischief, message):
    Checkpoints(tmp_path, ALONE).save(1, {"model": {"a": torch.ones(64)}})
    folder = tmp_path / "step_00000001"
    content = torch.load(folder / "state.pt", weights_only=True)
    mischief(folder, content)
    torch.save(content, folder / "state.pt")
    with pytest.raises(ValueError, match=message):
        read_file(folder)


def test_moments_of_another_shape_are_refused(tmp_path):
    model = tiny_model()
    optimizer = make_adamw(model, 1e-2)
    accumulate(ALONE, model, optimizer, ALONE.make_scaler(), [step_images(0)], squares)
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(2)
    Checkpoints(tmp_path, ALONE).save(1, {"model": model.state_dict(), "optimizer": state})
    with pytest.raises(ValueError, match=r"optimizer/state/0/exp_avg is \(2,\), expected \(8, 6\)"):
        restore(model, optimizer, Checkpoints(tmp_path, ALONE).load_latest())


def test_the_remedy_for_the_only_checkpoint_is_to_start_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(10, {"value": torch.ones(64)})
    truncate(tmp_path / "step_00000010" / "state.pt")
    with pytest.raises(ValueError, match="no older one"):
        checkpoints.load_latest()


def test_a_pointer_cannot_lead_outside_the_folder(tmp_path):
    Checkpoints(tmp_path / "other", ALONE).save(1, {})
    checkpoints = Checkpoints(tmp_path / "run", ALONE)
    checkpoints.save(1, {})
    (tmp_path / "run" / "latest").write_text("../other/step_00000001")
    with pytest.raises(ValueError, match="not the name of a checkpoint"):
        checkpoints.load_latest()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "trap").mkdir()
    torch.save({"values": Trap(), "files": [], "chunks": {}}, tmp_path / "trap" / "state.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "trap")
    assert not (tmp_path / "sprung").exists()


def test_what_could_not_be_read_back_is_refused_when_saving(tmp_path):
    with pytest.raises(TypeError, match=r"config/path is a PosixPath"):
        Checkpoints(tmp_path, ALONE).save(1, {"config": {"path": tmp_path}})


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(1, {})
    monkeypatch.setattr(shutil, "disk_usage", full_disk)
    monkeypatch.setattr(
        safetensors.torch, "save_file", lambda *_, **__: pytest.fail("nothing may be written")
    )
    with pytest.raises(OSError, match=r"No space left on device \(0\.250 GiB needed, 0\.000 GiB free\)"):
        checkpoints.save(2, {"value": torch.empty(2**26)})
    assert checkpoints.load_latest()["step"] == 1


def test_write_atomic_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "results.json"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise KeyError("writer")

    with pytest.raises(KeyError):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interval_in_steps_is_due_on_its_multiples():
    interval = Interval(ALONE, steps=3)
    assert [step for step in range(1, 10) if interval.due(step)] == [3, 6, 9]


def test_an_interval_without_steps_or_minutes_is_never_due():
    assert not any(Interval(ALONE).due(step) for step in range(10))


# --- configuration ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Settings for a test."""

    data_path: str = option(help="where the images are")
    batch_size: int = option(64, "images per step, 100% of them")
    lr: float | None = option(None, "learning rate; none derives it")
    ratio: float = option(0.75, "share masked")
    pin_mem: bool = option(True, "page-locked memory")
    head: Literal["linear", "dpt"] = option("dpt", "what is trained")
    students: tuple[str, ...] = option(("a",), "student models", aliases=("student",))
    betas: tuple[float, float] = option((0.9, 0.95), "of AdamW")
    blocks: tuple[int, ...] = option((3, 7), "which blocks")
    config: str | None = option(None, "YAML file")

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"--ratio must lie in 0 to 1, found {self.ratio}")


def failure(capsys, *argv: str) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as caught:
        parse(Settings, list(argv), prog="train")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_defaults_hold_where_nothing_is_given():
    assert parse(Settings, ["--data_path", "x"]) == Settings("x")


def test_every_kind_of_flag_is_read():
    argv = "--data_path x --batch_size 8 --lr 1e-4 --ratio 1 --no_pin_mem --head linear --student b c"
    argv += " --betas 0.5 1 --blocks 1 2 3"
    assert parse(Settings, argv.split()) == Settings(
        "x", 8, 1e-4, 1.0, False, "linear", ("b", "c"), (0.5, 1.0), (1, 2, 3)
    )


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    # 1e-4 without a dot is text in YAML 1.1; a whole number is a fine float.
    path.write_text("data_path: y\nbatch_size: 16\nlr: 1e-4\nratio: 1\nstudent: [s, t]\npin_mem: false\n")
    config = parse(Settings, ["--config", str(path), "--batch_size", "32", "--pin_mem"])
    assert config == Settings("y", 32, 1e-4, 1.0, True, students=("s", "t"), config=str(path))
    assert isinstance(config.ratio, float)


def test_none_on_the_command_line_overrides_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data_path: y\nlr: 0.5\n")
    assert parse(Settings, ["--config", str(path), "--lr", "none"]).lr is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--data_path x --btach_size 4", "unknown flag --btach_size: did you mean --batch_size?"),
        ("--data_path x --no_pin_men", "unknown flag --no_pin_men: did you mean --no_pin_mem?"),
        ("--data_path x stray", "unknown argument stray"),
        ("--data_path x --batch 4", "unknown flag --batch: did you mean --batch_size?"),
        ("--data_path x --batch_size many", "--batch_size must be a whole number, found many"),
        ("--data_path x --batch_size 1.5", "--batch_size must be a whole number, found 1.5"),
        ("--data_path x --ratio nan", "--ratio must be a finite number, found nan"),
        ("--data_path x --lr fast", "--lr must be a finite number or none, found fast"),
        ("--data_path x --head dtp", "--head must be one of linear, dpt, found dtp"),
        ("--data_path x --betas 0.9", "--betas: expected 2 arguments"),
        ("--data_path x --ratio 2", "--ratio must lie in 0 to 1, found 2.0"),
        ("--batch_size 4", "missing --data_path"),
        ("--config absent.yaml", "absent.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_in_one_line(capsys, argv, words):
    line = failure(capsys, *argv.split())
    assert line.startswith("train: error: ")
    assert words in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch-size: 4", "unknown key batch-size in {path}: did you mean batch_size?"),
        ("batch_size: many", "batch_size in {path} must be a whole number, found many"),
        ("batch_size: 2.0", "batch_size in {path} must be a whole number, found 2.0"),
        ("batch_size: true", "batch_size in {path} must be a whole number, found true"),
        ("pin_mem: 'no'", "pin_mem in {path} must be true or false, found no"),
        ("data_path: 7", "data_path in {path} must be text, found 7"),
        (
            "betas: [1, 2, 3]",
            "betas in {path} must be 2 values: a finite number, a finite number, found 1 2 3",
        ),
        ("students: a", "students in {path} must be a list of text, found a"),
        ("ratio: null", "ratio in {path} must be a finite number, found none"),
        ("student: [a]\nstudents: [b]", "students in {path} is given twice"),
        ("config: other.yaml", "unknown key config"),
        ("- a list", "{path} must hold `key: value` lines"),
        ("a: [", "{path} is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "{path} is not valid YAML"),
    ],
)
def test_a_mistake_in_yaml_is_named_in_one_line(capsys, tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert words.format(path=path) in failure(capsys, "--data_path", "x", "--config", str(path))


def test_help_shows_texts_defaults_and_choices(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Settings, ["--help"], prog="train")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Settings for a test.",
        "where the images are (required)",
        "images per step, 100% of them (default: 64)",
        "--pin_mem, --no_pin_mem page-locked memory (default: true)",
        "{linear,dpt}",
        "--student",
        "learning rate; none derives it (default: none)",
    ):
        assert words in text


def test_a_saved_configuration_parses_to_the_same_values(tmp_path):
    yaml_path, path = tmp_path / "run.yaml", tmp_path / "config.json"
    yaml_path.write_text("lr: 1e-4\nblocks: []\n")
    config = parse(Settings, ["--data_path", "x y", "--ratio", "1e-5", "--config", str(yaml_path)])
    save_config(config, path)
    again = parse(Settings, ["--config", str(path)])
    assert again == dataclasses.replace(config, config=str(path))
    assert yaml.safe_load(path.read_text())["data_path"] == "x y"


# --- logs ---------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict]:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()
    ]


def test_the_first_every_nth_and_the_last_step_are_logged(tmp_path):
    log = Log(tmp_path, total_steps=11, is_main=True, every=5)
    for step in range(1, 12):
        log.step(step, images=step * 8, loss=torch.tensor(0.5), memory_gib=lambda: 2.0, data={"damaged": 3})
    log.close()
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [1, 5, 10, 11]
    assert rows[1]["images"] == 40
    assert rows[1]["loss"] == 0.5
    assert rows[1]["memory_gib"] == 2.0
    assert rows[1]["data"] == {"damaged": 3}


def test_throughput_and_data_wait_are_those_since_the_line_before(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 2))  # 2 s from one logged line to the next
    monkeypatch.setattr(logs_module._Progress, "show", lambda *_: None)
    monkeypatch.setattr(logs_module._Progress, "advance", lambda *_: None)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    log = Log(tmp_path, total_steps=8, is_main=True, start_step=2, every=2)
    for step in range(3, 9):
        log.step(step, images=step * 10, data_wait=0.25)
    log.close()
    rows = lines(tmp_path)
    assert [row["images_per_second"] for row in rows] == [5.0, 10.0, 10.0]
    assert [row["data_wait_share"] for row in rows] == [0.125, 0.25, 0.25]


def test_nothing_leaves_the_device_between_logged_steps(tmp_path):
    log = Log(tmp_path, total_steps=10, is_main=True, every=5)
    log.step(1, images=1, loss=1.0)
    log.step(2, images=2, loss=lambda: pytest.fail("read between logged steps"))
    log.close()


def test_numbers_that_are_not_finite_are_logged_as_null(tmp_path):
    log = Log(tmp_path, total_steps=2, is_main=True)
    log.step(1, images=1, loss=torch.tensor(math.nan), grad_norm=math.inf)
    log.close()
    (row,) = lines(tmp_path)
    assert row["loss"] is None
    assert row["grad_norm"] is None


def test_lines_beyond_the_resumed_step_are_dropped(tmp_path):
    log = Log(tmp_path, total_steps=6, is_main=True, every=1)
    for step in range(1, 6):
        log.step(step, images=step)
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 1, "ima')  # cut off by a kill
    log = Log(tmp_path, total_steps=6, is_main=True, start_step=3, every=1)
    log.step(4, images=44)
    log.close()
    assert [(row["step"], row["images"]) for row in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 44)]


def test_other_ranks_write_nothing(tmp_path):
    log = Log(tmp_path / "run", total_steps=2, is_main=False)
    log.step(1, images=1, loss=1.0)
    log.close()
    assert not (tmp_path / "run").exists()


def test_progress_in_a_file_is_a_bounded_number_of_readable_lines(tmp_path, capsys, monkeypatch):
    clock = iter(range(100_000))  # a second passes whenever somebody looks
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    log = Log(tmp_path, total_steps=100, is_main=True, every=1)
    for step in range(1, 101):
        log.step(step, images=step, loss=0.5, lr=1e-4)
    log.close()
    printed = capsys.readouterr().out.splitlines()
    assert 10 < len(printed) < 40
    assert printed[0] == "step 1/100: loss 0.5, lr 0.0001"
    assert printed[1].endswith("left")
    assert printed[-1].startswith("step 100/100: ")


def test_progress_on_a_terminal_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = Log(tmp_path, total_steps=4, is_main=True, start_step=2, every=1)
    log.step(3, images=3, loss=0.5)
    log.step(4, images=4, loss=0.25)
    log.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err
    assert "loss 0.25" in captured.err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_report_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setattr(logs_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        Log(tmp_path, total_steps=1, is_main=False, **{name: True})


def test_weights_and_biases_receives_the_numbers_of_each_logged_line(tmp_path, monkeypatch):
    received = []

    class Run:
        def log(self, row, step):
            received.append((step, row))

        def finish(self):
            received.append("finished")

    class Client:
        __spec__ = object()

        @staticmethod
        def init(**_):
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Client)
    log = Log(tmp_path, total_steps=5, is_main=True, wandb=True)
    log.step(1, images=8, loss=0.5, data={"damaged": 3}, note="text")
    log.close()
    assert received == [(1, {"step": 1, "images": 8, "loss": 0.5, "data/damaged": 3}), "finished"]
