"""Copies, shards, or one process: the same losses, and checkpoints that any of them resumes from."""

import os
import pickle
import re
import warnings
import weakref
from pathlib import Path

import main_distill
import main_pretrain
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import ALONE, echoing_programs, flags_of_script
from safetensors.torch import load_file
from students import Batch, Objective, Student, StudentTrainer, make_trainer
from teachers import load_teacher, teacher_tokens
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pixio
from pixio.cli.main import main
from pixio.cli.plan import describe, make_plan
from pixio.engine.checkpoint import Checkpoints, materialize, read_checkpoint, restore
from pixio.engine.config import parse
from pixio.engine.optim import make_adamw
from pixio.engine.parallel import make_mesh, shard, skeleton, to_device
from pixio.engine.ranks import Ranks
from pixio.engine.runtime import Runtime, start_runtime
from pixio.engine.step import accumulate
from pixio.models.external import load_encoder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


STEPS, SAVED = 10, 5
IMAGES = 8  # of a step, over all ranks


def step_data(step: int, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """This rank's share of the images and mask noise of a step."""
    random = torch.Generator().manual_seed(step)
    images = torch.randn(IMAGES, 3, 64, 64, generator=random)
    noise = torch.rand(IMAGES, 4, generator=random)
    share = slice(
        runtime.rank * IMAGES // runtime.world_size, (runtime.rank + 1) * IMAGES // runtime.world_size
    )
    return images[share], noise[share]


def pretrain(runtime: Runtime, folder: Path, steps: range, checkpointing: bool = False) -> list[float]:
    """Losses of `steps`; the run begins, or resumes from the newest checkpoint, and saves one on its way."""
    torch.manual_seed(runtime.rank)  # rank 0's first weights must reach all
    mae = pixio.create_model("pixio_vitpico16_enc128x6h4_dec128x2h4", img_size=64, mask_grid=2)
    model = runtime.wrap(mae, activation_checkpointing=checkpointing)
    optimizer = make_adamw(mae, 1e-3)
    checkpoints = Checkpoints(folder, runtime)
    if steps.start:
        restore(mae, optimizer, checkpoints.load_latest())
    losses = []
    for step in steps:
        images, noise = step_data(step, runtime)
        size = len(images) // (1 if runtime.world_size == 1 else 2)  # of micro batches
        result = accumulate(
            runtime,
            model,
            optimizer,
            runtime.make_scaler(),
            list(zip(images.split(size), noise.split(size), strict=True)),
            lambda model, batch: model(batch[0], noise=batch[1]).loss,
            clip_grad=0.5,
        )
        losses.append([result.loss.item(), result.grad_norm.item()])
        if step + 1 == SAVED:
            state = {"model": mae.state_dict(), "optimizer": optimizer.state_dict()}
            exports = {
                folder.with_suffix(".pth"): lambda state: {"norm": state["model"]["encoder.norm.weight"]}
            }
            checkpoints.save(SAVED, state, exports, wait=False)
    checkpoints.wait()
    return losses


def distil(runtime: Runtime) -> list[float]:
    """Losses of a masked student with a teacher that `runtime` holds as it holds all models."""
    torch.manual_seed(runtime.rank)
    teacher = pixio.create_model("pixio_vitti16", img_size=64).requires_grad_(False).eval()
    teacher.blocks = teacher.blocks[:2]
    runtime.wrap(teacher)
    encoder = pixio.create_model("pixio_vitpico16", img_size=64)
    losses = {"loss_fn_cls": "cosine", "loss_fn_patch": "mse", "loss_fuse": "avg"}
    objective = Objective(encoder.grid, 0.5, 2, losses)
    trainer = StudentTrainer("pico", Student(encoder, teacher.embed_dim), objective, 1e-3, runtime, 0.05)
    found = []
    for step in range(STEPS):
        images, noise = step_data(step, runtime)
        batch = Batch(images, teacher_tokens(teacher, images, encoder.grid), noise)
        result = accumulate(
            runtime, trainer.model, trainer.optimizer, trainer.scaler, [batch], trainer.loss_fn
        )
        found.append(result.loss.item())
    return found


class Tables(nn.Module):
    """Parameters, and tables that no checkpoint holds, inside of blocks and beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("table", torch.randn(3), persistent=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
        for block in self.blocks:
            block.register_buffer("table", torch.randn(3), persistent=False)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, whole, whatever they are saved as."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.detach().clone() for name, t in named}


def first_weights(runtime: Runtime, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The values with which models start, as `runtime` gives them to its ranks."""
    flags = ["--model", "pixio_vitpico16_enc128x6h4_dec128x2h4", "--input_size", "64", "--mask_grid", "2"]
    config = parse(main_pretrain.PretrainConfig, [*flags, "--position_init", "sincos"])
    loaded = parse(main_pretrain.PretrainConfig, [*flags, "--init_encoder", str(folder / "encoder.pth")])
    student = ["--student_models", "pixio_vitpico16", "--input_size", "64", "--mask_grid", "2"]
    distilled = parse(main_distill.DistillConfig, student)
    builders = {
        "mae": lambda: main_pretrain.first_model(config),
        "loaded mae": lambda: main_pretrain.first_model(loaded),
        "teacher": lambda: load_teacher(
            "pixio_vitpico16", str(folder / "encoder.pth"), runtime.device, torch.bfloat16
        ),
        "tables": Tables,
    }
    found = {}
    for name, builder in builders.items():
        runtime.seed(5, step=0)
        model = runtime.build(builder)
        assert runtime.is_main or all(value.is_meta for value in values_of(model).values())
        runtime.wrap(model)
        found[name] = values_of(model)
    found["whole"] = values_of(runtime.build(builders["teacher"], whole=True))
    teacher = runtime.build(builders["teacher"])
    found["student"] = values_of(make_trainer(distilled, runtime, teacher, 0).student)
    return found


def failures(runtime: Runtime, folder: Path) -> list[str]:
    """What this rank says when rank 0 cannot build."""
    config = parse(main_pretrain.PretrainConfig, ["--init_encoder", str(folder / "missing.pth")])
    said = []
    for function in (lambda: main_pretrain.first_model(config), lambda: {}["absent"]):
        try:
            runtime.build(function)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def two_ranks(rank: int, folder: Path) -> None:
    """Everything with two ranks, in one start of them."""
    torch.set_num_threads(1)
    found = {}
    for parallel in ("ddp", "fsdp"):
        address = f"file://{folder}/{parallel}2"
        runtime = start_runtime("cpu", "fp32", 2, rank, address, parallel)
        shards = parallel == "fsdp"
        found[f"{parallel}2"] = pretrain(
            runtime, folder / f"from-{parallel}2", range(STEPS), checkpointing=shards
        )
        found[f"{parallel}2 distillation"] = distil(runtime)
        found[f"{parallel}2 first weights"] = first_weights(runtime, folder)
        found[f"{parallel}2 failures"] = failures(runtime, folder)
        runtime.close()
    torch.save(found, folder / f"two-{rank}.pt")


def four_ranks(rank: int, folder: Path) -> None:
    """Four ranks, as of two nodes, resume from what two ranks with shards saved."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
    found = {}
    for parallel in ("ddp", "hybrid"):
        address = f"file://{folder}/{parallel}4"
        runtime = start_runtime("cpu", "fp32", dist_url=address, parallel=parallel)
        found[f"{parallel}4"] = pretrain(runtime, folder / "from-fsdp2", range(SAVED, STEPS))
        if parallel == "hybrid":
            Checkpoints(folder / "from-hybrid4", runtime).save(1, {"model": shards_of_a_model(runtime)})
        runtime.close()
    torch.save(found, folder / f"four-{rank}.pt")


def shards_of_a_model(runtime: Runtime) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return runtime.wrap(nn.Sequential(nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 1)]))).state_dict()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """What each way of running gave on each of its ranks, by its name."""
    folder = tmp_path_factory.mktemp("parallel")
    found = {
        "one": [pretrain(ALONE, folder / "from-one", range(STEPS))],
        "one distillation": [distil(ALONE)],
        "folder": folder,
    }
    torch.save(pixio.create_model("pixio_vitpico16", img_size=64).state_dict(), folder / "encoder.pth")
    found["one first weights"] = [first_weights(ALONE, folder)]
    mp.spawn(two_ranks, (folder,), nprocs=2)
    found["one from fsdp2"] = [pretrain(ALONE, folder / "from-fsdp2", range(SAVED, STEPS))]
    mp.spawn(four_ranks, (folder,), nprocs=4)
    for name, ranks in (("two", 2), ("four", 4)):
        for rank in range(ranks):
            for key, value in torch.load(folder / f"{name}-{rank}.pt", weights_only=True).items():
                found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_two_ranks_with_copies_or_shards_equal_one_process(runs, name):
    assert len(runs[name]) == 2
    for losses in runs[name]:
        torch.testing.assert_close(losses, runs["one"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_distillation_on_two_ranks_equals_one_process(runs, name):
    for losses in runs[f"{name} distillation"]:
        torch.testing.assert_close(losses, runs["one distillation"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_what_rank_0_alone_builds_every_rank_receives_bit_for_bit(runs, name):
    """Also what no checkpoint holds: fixed tables, types of frozen weights."""
    for models in runs[f"{name} first weights"]:
        for model, expected in runs["one first weights"][0].items():
            assert models[model].keys() == expected.keys()
            for key, value in expected.items():
                assert models[model][key].dtype == value.dtype, key
                assert torch.equal(models[model][key], value), f"{model} {key}"


@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_a_model_that_rank_0_cannot_build_is_an_error_of_every_rank(runs, name):
    (missing, bug), (missing_there, bug_there) = runs[f"{name} failures"]
    assert missing == missing_there
    assert "missing.pth" in missing
    assert (bug, bug_there) == ("KeyError: 'absent'", "ValueError: rank 0: KeyError: 'absent'")


def test_another_librarys_encoder_without_its_values_is_sent_and_filled():
    encoder = load_encoder("timm/vit_small_patch16_dinov3", depth=2, embed_dim=48, num_heads=2)
    copy = pickle.loads(pickle.dumps(skeleton(encoder)))
    assert all(value.is_meta for value in values_of(copy).values())
    to_device(copy, ALONE.device)
    for value, empty in zip(
        (*encoder.parameters(), *encoder.buffers()), (*copy.parameters(), *copy.buffers()), strict=True
    ):
        empty.data.copy_(value)
    images = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        for key, value in encoder(images, [-1])[0].items():
            assert torch.equal(copy(images, [-1])[0][key], value)


@pytest.mark.parametrize("name", ["one from fsdp2", "ddp4", "hybrid4"])
def test_what_two_ranks_with_shards_saved_resumes_on_any_others(runs, name):
    assert len(runs[name]) == (4 if "4" in name else 1)
    for losses in runs[name]:
        torch.testing.assert_close(losses, runs["one"][0][SAVED:], atol=1e-4, rtol=0)


def test_every_rank_writes_its_part_of_what_is_in_shards(runs):
    checkpoint = runs["folder"] / "from-fsdp2" / f"step_{SAVED:08d}"
    sizes = [path.stat().st_size for path in sorted(checkpoint.glob("*.safetensors"))]
    assert len(sizes) == 2
    assert max(sizes) < 1.05 * min(sizes)


def test_a_checkpoint_of_shards_rebuilds_the_model(runs):
    path = runs["folder"] / "from-fsdp2" / f"step_{SAVED:08d}"
    whole = materialize(read_checkpoint(runs["folder"] / "from-one" / path.name)["model"])
    for name, tensor in pixio.load_mae(path, num_heads=4, decoder_num_heads=4).state_dict().items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-4, rtol=1e-3, msg=name)


def test_an_export_holds_whole_tensors(runs):
    exported = torch.load(runs["folder"] / "from-fsdp2.pth", weights_only=True)
    saved = materialize(read_checkpoint(runs["folder"] / "from-fsdp2" / f"step_{SAVED:08d}"))
    assert exported.keys() == {"norm"}
    assert torch.equal(exported["norm"], saved["model"]["encoder.norm.weight"])


def test_shards_of_nodes_with_copies_are_put_together_once(runs):
    """Also of tensors with fewer rows than ranks. Both nodes write."""
    path = runs["folder"] / "from-hybrid4" / "step_00000001"
    saved = materialize(read_checkpoint(path)["model"])
    expected = shards_of_a_model(ALONE)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    written = sum(
        load_file(file)[name].numel() for file in path.glob("*.safetensors") for name in load_file(file)
    )
    assert written == sum(tensor.numel() for tensor in expected.values())
    assert [file.name for file in sorted(path.glob("*.safetensors"))] == [
        f"rank_{rank:05d}.safetensors" for rank in range(4)
    ]


def test_a_model_in_shards_returns_no_views_that_would_lose_its_gradients():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mae = pixio.create_model("pixio_vitpico16_enc128x6h4_dec128x2h4", img_size=64, mask_grid=2)
        shard(mae, make_mesh("cpu", Ranks(0, 0, 2, 2), "fsdp"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = mae(torch.rand(2, 3, 64, 64))
    finally:
        dist.destroy_process_group()
    assert not output.pred._is_view()
    assert output.pred.requires_grad


@pytest.mark.parametrize(("on_one", "found"), [(4, "6 in all and 4 on one"), (0, "an unknown number on one")])
def test_nodes_that_cannot_each_hold_a_copy_are_refused(on_one, found):
    with pytest.raises(ValueError, match=f"{found}: choose fsdp"):
        make_mesh("cpu", Ranks(0, 0, 6, on_one), "hybrid")


def test_ranks_that_alternate_between_nodes_are_refused():
    with pytest.raises(ValueError, match="found rank 1 as number 0 of 2 on its node"):
        make_mesh("cpu", Ranks(1, 0, 4, 2), "hybrid")


# ------------------------------------------------------------------------------------------------- planning

SMALL = "pixio_vitti16_enc192x12h3_dec128x4h4"
HUGE = "pixio_vit5b16_enc3072x48h32_dec512x32h16"


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are still alive, and the most there were."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def measured(dtype: str, checkpointing: bool) -> tuple[Live, int, nn.Module]:
    """Bytes alive after the forward pass and at the worst moment of a real step of 8 images."""
    model = pixio.create_model(SMALL)
    ALONE.wrap(model, activation_checkpointing=checkpointing)
    images = torch.rand(8, 3, 256, 256)
    live = Live([images, *model.parameters()])
    with live:
        # not the runtime's: on a CPU that takes other kernels of attention in bf16 than a GPU has
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(images).loss
        after = live.bytes
        loss.backward()
    return live, after + images.nbytes, model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_planned_activations_are_those_of_a_real_forward_pass(dtype):
    setting = make_plan(SMALL, gpus=1, batch=8, dtype=dtype).settings[0]
    _, after, _ = measured(dtype, checkpointing=False)
    assert setting.activations + setting.working == pytest.approx(after, rel=0.06)


def test_planned_weights_gradients_and_moments_are_those_of_a_real_step():
    setting = make_plan(SMALL, gpus=1, batch=8).settings[0]
    _, _, model = measured("fp32", checkpointing=False)
    optimizer = make_adamw(model, 1e-3)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert setting.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert setting.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    assert setting.optimizer == sum(value.nbytes for value in moments)


def test_activation_checkpointing_saves_what_the_plan_says():
    plan = make_plan(SMALL, gpus=1, batch=8, dtype="fp32")
    peaks = [measured("fp32", checkpointing)[0].peak for checkpointing in (False, True)]
    saved = plan.settings[0].activations - plan.settings[1].activations
    assert peaks[0] - peaks[1] == pytest.approx(saved, rel=0.15)


def test_planned_arithmetic_is_that_of_the_layers():
    """The encoder sees 264 tokens; two operations per weight and token, and attention."""
    plan = make_plan("pixio_vitb16", gpus=1, batch=2)
    tokens, width, depth = 264, 768, 12
    matrices = depth * 12 * width * width * tokens * 2
    attention = depth * 2 * 2 * tokens * tokens * width
    patches = 256 * 768 * width * 2
    assert plan.forward_flops == pytest.approx(matrices + attention + patches, rel=1e-3)


@pytest.mark.parametrize("parallel", ["hybrid", "fsdp"])
def test_the_5b_model_on_the_meta_device_is_divided_over_256_ranks_as_planned(parallel):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=256)
    try:
        with torch.device("meta"):
            model = pixio.create_model(HUGE)
        shard(model, make_mesh("cpu", Ranks(0, 0, 256, 8), parallel), torch.bfloat16)
        held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
    setting = next(s for s in make_plan(HUGE, gpus=256, batch=1).settings if parallel in s.flags)
    assert setting.weights == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize(("gpus", "possible"), [(16, True), (12, False), (8, False)])
def test_hybrid_sharding_is_planned_where_it_can_run(gpus, possible):
    flags = [setting.flags for setting in make_plan(SMALL, gpus=gpus, batch=1).settings]
    assert any("hybrid" in flag for flag in flags) == possible


def test_the_plan_of_the_published_5b_run_needs_shards():
    text = describe(make_plan(HUGE, gpus=256, batch=64), gpu_memory=80)
    assert "5,543,919,360 parameters" in text
    assert "90% of 80 GiB: take --parallel hybrid" in text
    fits = [line.endswith("fits") for line in text.splitlines()[2:-1]]
    assert fits == [False, False, True, True, True, True]


def test_masked_students_and_their_teacher_are_counted_together():
    """Teacher: whole images, forward only. Students: 128 of 256 patches, and take turns with activations."""
    names = ("pixio_vitti16", "pixio_vitpico16")
    plan = make_plan(names, gpus=1, batch=2, mask_ratio=0.5, teacher="pixio_vits16")
    ti, pico = (make_plan(name, gpus=1, batch=2, mask_ratio=0.5) for name in names)
    teacher = make_plan("pixio_vits16", gpus=1, batch=2)
    assert plan.step_flops == 3 * (ti.forward_flops + pico.forward_flops) + teacher.forward_flops
    assert 0.45 < ti.forward_flops / make_plan("pixio_vitti16", gpus=1, batch=2).forward_flops < 0.55
    whole, first, second = plan.settings[0], ti.settings[0], pico.settings[0]
    assert whole.weights == first.weights + second.weights + teacher.settings[0].weights // 2
    assert whole.activations == first.activations


SCRIPTS = sorted(path for path in ROOT.glob("*/scripts/*.sh") if not path.stem.endswith("_cpu"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_hours_in_the_header_of_a_script_are_those_of_the_plan(script, tmp_path, capsys):
    data = {"IMAGENET_TARS": "/tars", "WEB_TARS": "/web", "WEB_STATS": "/stats", "TEACHER": "/teacher.pth"}
    flags, launcher = flags_of_script(script, echoing_programs(tmp_path, **data))
    header = r"#   hours      about ([\d.]+) hours on (\w+) \(computed by pixio plan at 40 % MFU\)"
    stated, card = re.search(header, script.read_text()).groups()
    words = ["--card", card, "--gpus", int(launcher.get("nodes", 1)) * int(launcher.get("ngpus", 1))]
    if "distill" in script.stem:
        config = parse(main_distill.DistillConfig, flags)
        (mask_ratio,) = config.mask_ratio
        words += [*config.student_models, "--teacher", config.teacher_model]
    else:
        config = parse(main_pretrain.PretrainConfig, flags)
        mask_ratio = config.mask_ratio
        words.append(config.model)
    words += ["--mask_ratio", mask_ratio, "--batch", config.batch_size, "--accum_iter", config.accum_iter]
    main(["plan", *map(str, words), "--steps", str(config.total_steps)])
    hours = re.search(r"at 40% MFU .* the run takes ([\d.,]+) hours", capsys.readouterr().out)[1]
    assert float(stated) == pytest.approx(float(hours.replace(",", "")), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pixio_vitb16", 0, 8), "--gpus must be at least 1, found 0"),
        (("pixio_vitb16", 1, 0), "--batch must be at least 1, found 0"),
        (("pixio_vitb17", 1, 1), "did you mean"),
        (("pixio_vitb16", 1, 1, "int8"), "choose bf16, fp16, fp32"),
    ],
)
def test_impossible_plans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(*arguments)
