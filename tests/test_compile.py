"""Compiled blocks: one graph for each shape, nothing left to Python between, the numbers of eager mode."""

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import main_pretrain
import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from held_out import HeldOut
from helpers import ALONE, read_log
from PIL import Image
from students import Batch, Objective, Student, StudentTrainer
from teachers import teacher_tokens
from torch._dynamo.utils import counters

import pixio
from pixio.engine import parallel as parallel_module
from pixio.engine.optim import make_adamw
from pixio.engine.parallel import make_mesh
from pixio.engine.ranks import Ranks
from pixio.engine.runtime import Runtime
from pixio.engine.step import accumulate

MAE = "pixio_vitpico16_enc128x6h4_dec128x2h4"


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """Graphs are traced and counted, but not turned into machine code."""
    monkeypatch.setattr(parallel_module, "BACKEND", "eager")
    monkeypatch.setattr(Runtime, "_compiles", lambda self, wanted: bool(wanted))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@contextmanager
def runtime_of(parallel: str) -> Iterator[Runtime]:
    """This process alone, or the only rank with a copy or with shards."""
    if parallel == "one":
        yield ALONE
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = make_mesh("cpu", Ranks(0, 0, 1, 1), "fsdp") if parallel == "fsdp" else None
        yield Runtime(ALONE.device, rank=0, world_size=2, mesh=mesh)
    finally:
        dist.destroy_process_group()


def assert_graphs(number: int) -> None:
    assert counters["stats"]["unique_graphs"] == number
    assert not counters["graph_break"]


def mae_losses(runtime: Runtime, compile: bool, checkpointing: bool = False, sizes=(64, 64)) -> list[float]:
    torch.manual_seed(0)
    mae = pixio.create_model(MAE, img_size=64, mask_grid=2, drop_path=0.4)
    names = list(mae.state_dict())
    model = runtime.wrap(mae, checkpointing, compile).train()
    assert list(mae.state_dict()) == names
    optimizer = make_adamw(mae, 1e-3)
    losses = []
    for step, size in enumerate(sizes):
        runtime.seed(0, step)
        images = torch.randn(4, 3, size, size)
        result = accumulate(
            runtime, model, optimizer, runtime.make_scaler(), [images], lambda model, x: model(x).loss
        )
        losses.append(result.loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parallel", ["one", "ddp", "fsdp"])
def test_encoder_and_decoder_are_a_graph_each_whatever_the_depth_and_the_rates(parallel, checkpointing):
    with runtime_of(parallel) as runtime:
        eager = mae_losses(runtime, compile=False)
        assert_graphs(0)
        compiled = mae_losses(runtime, compile=True, checkpointing=checkpointing)
    assert_graphs(2)
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_skipped_images_share_a_graph_whatever_their_number():
    def outputs(compile: bool) -> list[float]:
        torch.manual_seed(0)
        options = {"img_size": 32, "embed_dim": 16, "depth": 5, "num_heads": 2}
        encoder = pixio.PixioViT(**options, drop_path=0.5, drop_path_mode="skip")
        ALONE.wrap(encoder, compile=compile).train()
        return encoder(torch.randn(16, 3, 32, 32), [-1])[0]["patch_tokens"].flatten().tolist()

    assert outputs(compile=True) == pytest.approx(outputs(compile=False), abs=1e-5)
    assert_graphs(2)  # of all images, and of some


def test_the_held_out_loss_is_a_graph_each_for_encoder_and_decoder(tmp_path):
    """Beside those of training, as it is computed without gradients and without stochastic depth."""
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
    mae = pixio.create_model(MAE, img_size=64, mask_grid=2, drop_path=0.4)
    held_out = HeldOut(str(tmp_path), mae, mask_ratio=0.75)
    eager = held_out.loss(ALONE, mae, batch_size=3)
    model = ALONE.wrap(mae, compile=True).train()
    for _ in range(2):
        model(torch.randn(3, 3, 64, 64)).loss.backward()
        assert held_out.loss(ALONE, model, batch_size=3) == pytest.approx(eager, rel=1e-5)
    assert_graphs(2 + 2)


def test_each_size_of_images_is_a_graph_of_its_own():
    """Also where there are more than torch compiles of a function on its own."""
    encoder = pixio.PixioViT(img_size=64, embed_dim=16, depth=3, num_heads=2)
    ALONE.wrap(encoder, compile=True).eval()
    sizes = [16 * (1 + number) for number in range(9)]
    with torch.inference_mode():
        for size in sizes + sizes:
            encoder(torch.randn(1, 3, size, 32))
    assert_graphs(9)


@pytest.mark.parametrize(("mask_ratio", "graphs"), [(0.5, 2), (0.0, 2)])
def test_teacher_and_student_are_a_graph_each_masked_or_whole(mask_ratio, graphs):
    def losses(compile: bool) -> list[float]:
        torch.manual_seed(0)
        teacher = pixio.create_model("pixio_vitti16", img_size=64).requires_grad_(False).eval()
        teacher.blocks = teacher.blocks[:2]
        teacher = ALONE.wrap(teacher, compile=compile)
        encoder = pixio.create_model("pixio_vitpico16", img_size=64, drop_path=0.2)
        terms = {"loss_fn_cls": "cosine", "loss_fn_patch": "mse", "loss_fuse": "avg"}
        objective = Objective(encoder.grid, mask_ratio, 2, terms)
        student = Student(encoder, teacher.embed_dim)
        trainer = StudentTrainer("pico", student, objective, 1e-3, ALONE, 0.05, compile=compile)
        found = []
        for _ in range(2):
            images = torch.randn(2, 3, 64, 64)
            batch = Batch(images, teacher_tokens(teacher, images, encoder.grid))
            step = (trainer.model, trainer.optimizer, trainer.scaler, [batch], trainer.loss_fn)
            found.append(accumulate(ALONE, *step).loss.item())
        return found

    eager = losses(compile=False)
    assert losses(compile=True) == pytest.approx(eager, rel=1e-5)
    assert_graphs(graphs)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_run_compiled_to_machine_code_is_that_of_eager_mode(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no processes that outlive the test
    flags = f"--model {MAE} --input_size 64 --mask_grid 2 --drop_path 0.2 --dtype fp32 --batch_size 2"
    flags += " --dataset_type scenes --num_workers 0 --epochs 1 --iters_per_epoch 3 --warmup_epochs 0"
    rows = {}
    for switch in ("no_compile", "compile"):
        words = [*shlex.split(flags), f"--{switch}", "--log_freq", "1"]
        main_pretrain.main([*words, "--output_dir", str(tmp_path / switch)])
        rows[switch] = [[row["loss"], row["grad_norm"]] for row in read_log(tmp_path / switch)]
    assert_graphs(1 + 2)  # the trial, encoder, decoder
    torch.testing.assert_close(rows["compile"], rows["no_compile"], rtol=1e-3, atol=0)
