"""The engine on two real gloo ranks: steps, collectives, checkpoints and intervals."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from helpers import ALONE, equal, full_disk, squares, step_images, tiny_model, weights, zero
from torch import nn

from pixio.engine import checkpoint as checkpoint_module
from pixio.engine import signals
from pixio.engine.checkpoint import Checkpoints, Interval, materialize
from pixio.engine.optim import make_adamw
from pixio.engine.runtime import Runtime, start_runtime
from pixio.engine.step import Agreement, NonFiniteLoss, accumulate
from pixio.engine.training import TrainConfig, state_to_resume

pytestmark = pytest.mark.slow
STEPS = 3


def run_rank(rank: int, folder: Path) -> None:
    """All that is tried on two ranks, in one start of them; what each found is left in a file."""
    torch.set_num_threads(1)
    runtime = start_runtime(
        "cpu", "fp32", world_size=2, local_rank=rank, dist_url=f"file://{folder}/rendezvous"
    )
    found = {}

    runtime.seed(7, rank)  # different first weights: rank 0's must reach the other
    model = runtime.wrap(tiny_model() if rank == 0 else nn.Sequential(*tiny_model()).apply(zero))
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

    found |= agree_late(runtime, model, optimizer)
    torch.save(found, folder / f"rank{rank}.pt")
    runtime.close()


def agree_late(runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Steps whose answers are read one step later: a clock, a signal, and a loss that is not finite."""
    found, rank = {"due": [], "stop": []}, runtime.rank
    with pytest.MonkeyPatch.context() as patch:
        now = 0.0
        patch.setattr(checkpoint_module, "time", SimpleNamespace(monotonic=lambda: now))
        interval = Interval(steps=4, minutes=1)
        agreement = Agreement(runtime, 0, interval.late)
        scaler = runtime.make_scaler()
        for step, seconds in enumerate((30.0, 61.0, 62.0, 63.0), start=1):
            now = seconds if rank == 0 else 1e6 * step  # rank 1's clock would always say yes
            patch.setattr(signals, "received", lambda step=step: step == 3 and rank == 1)
            images = step_images(step)
            accumulate(runtime, model, optimizer, scaler, [images], squares, None, agreement)
            found["due"].append(interval.due(step, agreement.late))
            found["stop"].append(agreement.stop)
            if found["due"][-1]:
                agreement.settle()
        before = weights(model)
        images = torch.full((2, 6), math.nan if rank == 1 else 1.0)
        accumulate(runtime, model, optimizer, scaler, [images], squares, None, agreement)
        found["skipped"] = [equal(before, weights(model))]
        try:
            accumulate(runtime, model, optimizer, scaler, [step_images(6)], squares, None, agreement)
        except NonFiniteLoss as error:
            found["late"] = (str(error), error.step)
        found["skipped"].append(equal(before, weights(model)))
    return found


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
        found["resumed"] = materialize(state_to_resume(config, empty, ()))
        found["summed"] = list(summed)
        if rank == 1:
            patch.setattr(
                checkpoint_module.zipfile, "ZipFile", lambda *_: (_ for _ in ()).throw(OSError("bad"))
            )
        with pytest.raises(ValueError, match="bad") as caught:
            state_to_resume(config, empty, ())
        found["unreadable"] = str(caught.value)
    return found


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


def test_ranks_follow_the_clock_of_rank_0_and_the_signals_of_all_a_step_later(two_ranks):
    # Late by the clock at step 2, which is read after step 3; then every fourth step.
    assert [found["due"] for found in two_ranks] == [[False, False, True, True]] * 2
    assert [found["stop"] for found in two_ranks] == [[False, False, False, True]] * 2


def test_a_loss_that_is_not_finite_moves_no_weights_until_all_ranks_have_read_of_it(two_ranks):
    for found in two_ranks:
        assert found["skipped"] == [True, True]
        assert "rank 1: nan" in found["late"][0]
        assert found["late"][1] == 4
