"""Distillation: losses against float64, one teacher for several students, kills, ranks, caches, scripts."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import feature_cache
import main_distill
import pytest
import torch
import torch.multiprocessing as mp
from feature_cache import Cache, CachedBatches, open_cache
from helpers import ALONE, echoing_programs, flags_of_script
from students import Batch, Objective, Student, StudentTrainer
from teachers import load_teacher, teacher_tokens
from token_losses import Tokens, token_loss
from torch import Tensor

import pixio
from pixio.data import open_stream
from pixio.engine import signals
from pixio.engine.checkpoint import Checkpoints, materialize, read_checkpoint
from pixio.engine.config import parse
from pixio.engine.runtime import Runtime, start_runtime
from pixio.engine.step import NonFiniteLoss, apply_gradients, compute_gradients
from pixio.images.crops import resize_center_crop
from pixio.images.decoding import decode
from pixio.images.normalization import normalize
from pixio.models.external import load_encoder
from pixio.models.layers import sincos_positions
from pixio.synthetic.trees import write_tree

ROOT = Path(__file__).resolve().parents[1]


PICO, TI = "pixio_vitpico16", "pixio_vitti16"
TINY = "--mask_ratio 0 --input_size 64 --batch_size 4 --dtype fp32 --device cpu --num_workers 0 --lr 1e-3"
SHORT = "--epochs 3 --iter_per_epoch 2 --warmup_epochs 1 --log_freq 1 --save_steps 2 --save_freq 0"
MASKED = "--mask_ratio 0.5 0.25 --mask_grid 2 --drop_path 0.1 0.2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve images, and `teacher.pth`, a small Pixio."""
    folder = tmp_path_factory.mktemp("distillation")
    write_tree("imagenet-folders", folder / "images", 12, 0, size=64)
    torch.manual_seed(0)
    for name in ("teacher", "other_teacher"):
        torch.save(pixio.pixio_vitpico16(img_size=64).state_dict(), folder / f"{name}.pth")
    return folder


def flags_of(folder: Path, *flags: object, students: str = f"{PICO} {TI}") -> list[str]:
    teacher = f"--teacher_model {PICO} --teacher_pretrained {folder}/teacher.pth"
    data = f"--dataset_type folder --data_path {folder}/images/train"
    words = shlex.split(f"{teacher} --student_models {students} {data} {TINY} {SHORT}")
    return words + [word for flag in flags for word in shlex.split(str(flag))]


def run(folder: Path, *flags: object, students: str = f"{PICO} {TI}") -> None:
    main_distill.main(flags_of(folder, *flags, students=students))


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoint_of(folder: Path) -> dict:
    name = (folder / "checkpoints" / "latest").read_text().strip()
    return materialize(read_checkpoint(folder / "checkpoints" / name))


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_students_of_short_runs_start_from_sine_cosine_positions_when_asked(folder):
    config = parse(main_distill.DistillConfig, flags_of(folder, "--position_init sincos", students=PICO))
    runtime = start_runtime("cpu", "fp32")
    student = main_distill.make_trainer(config, runtime, pixio.pixio_vitti16(img_size=64), 0).student
    patches = student.encoder.pos_embed[:, student.encoder.n_cls_tokens :]
    torch.testing.assert_close(patches.detach(), sincos_positions((4, 4), 128))


# --- losses -------------------------------------------------------------------------------------------------


def distance_by_hand(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Token by token, in the type of the arguments."""
    if name == "cosine":
        similarity = (a * b).sum(-1) / (a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt())
        return (1 - similarity).sum() / similarity.numel()
    difference = (a - b).abs() if name == "l1" else (a - b) ** 2
    return difference.sum() / difference.numel()


COMBINATIONS = list(
    itertools.product(("none", "cosine", "l1", "mse"), ("cosine", "l1", "mse"), ("avg", "sum"), (0.0, 0.75))
)


@pytest.mark.parametrize(("loss_fn_cls", "loss_fn_patch", "loss_fuse", "mask_ratio"), COMBINATIONS)
def test_loss_and_gradients_equal_a_float64_computation(loss_fn_cls, loss_fn_patch, loss_fuse, mask_ratio):
    generator = torch.Generator().manual_seed(3)
    n_cls, side, cells = 3, 4, 4  # a grid of 4 x 4 patches in cells of 2 x 2
    said = [torch.randn(2, n, 5, generator=generator, requires_grad=True) for n in (n_cls, side**2)]
    teacher = Tokens(*(torch.randn(2, n, 5, generator=generator) for n in (n_cls, side**2)))
    noise = torch.rand(2, cells, generator=generator)

    def model(images: Tensor, keep: Tensor | None = None) -> Tokens:
        patch = said[1] if keep is None else torch.stack([said[1][i, keep[i]] for i in range(2)])
        return Tokens(said[0], patch)

    losses = {"loss_fn_cls": loss_fn_cls, "loss_fn_patch": loss_fn_patch, "loss_fuse": loss_fuse}
    objective = Objective((side, side), mask_ratio, 2, losses)
    terms = objective(model, Batch(torch.zeros(2, 3, 64, 64), teacher, noise))
    loss = terms.total
    loss.backward()

    cls, patch = (value.detach().double().requires_grad_() for value in said)
    visible = [
        [
            row * side + column
            for row, column in itertools.product(range(side), repeat=2)
            if mask_ratio == 0 or (row // 2) * 2 + column // 2 == noise[image].argmin()
        ]
        for image in range(2)
    ]
    seen = torch.stack([patch[image, visible[image]] for image in range(2)])
    target = torch.stack([teacher.patch[image, visible[image]] for image in range(2)])
    expected = distance_by_hand(loss_fn_patch, seen, target.double())
    torch.testing.assert_close(terms.patch.double(), expected, atol=1e-6, rtol=1e-6)
    if loss_fn_cls != "none":
        expected_cls = distance_by_hand(loss_fn_cls, cls, teacher.cls.double())
        torch.testing.assert_close(terms.cls.double(), expected_cls, atol=1e-6, rtol=1e-6)
        share = 0.5 if loss_fuse == "avg" else n_cls / (n_cls + len(visible[0]))
        expected = share * expected_cls + (1 - share) * expected
    expected.backward()

    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(said[1].grad.double(), patch.grad, atol=1e-6, rtol=1e-5)
    if loss_fn_cls != "none":
        torch.testing.assert_close(said[0].grad.double(), cls.grad, atol=1e-6, rtol=1e-5)


def test_without_a_class_loss_the_loss_is_exactly_the_patch_term():
    torch.manual_seed(0)
    student, teacher = (Tokens(torch.randn(2, 3, 5), torch.randn(2, 4, 5)) for _ in range(2))
    for fuse in ("avg", "sum"):
        loss = token_loss(student, teacher, "none", "mse", fuse).total
        assert torch.equal(loss, torch.nn.functional.mse_loss(student.patch, teacher.patch))


# --- the teacher --------------------------------------------------------------------------------------------


def test_the_teacher_speaks_for_whole_images_before_its_final_norm(folder):
    teacher = load_teacher(PICO, str(folder / "teacher.pth"), ALONE.device, torch.float32)
    images = torch.randn(2, 3, 64, 64)
    tokens = teacher_tokens(teacher, images, (4, 4))
    expected = pixio.pixio_vitpico16(folder / "teacher.pth", img_size=64)(images)[-1]
    assert torch.equal(tokens.cls, expected["cls_tokens"])
    assert torch.equal(tokens.patch, expected["patch_tokens"])
    assert not tokens.patch.requires_grad


def test_weights_in_bf16_give_what_autocast_gives_bit_for_bit(folder):
    runtime = Runtime(torch.device("cpu"), torch.bfloat16)
    halved, whole = (
        load_teacher(PICO, str(folder / "teacher.pth"), runtime.device, dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    images = torch.randn(2, 3, 64, 64)
    with runtime.autocast():
        first, second = (teacher_tokens(teacher, images, (4, 4)) for teacher in (halved, whole))
    assert torch.equal(first.cls, second.cls)
    assert torch.equal(first.patch, second.patch)
    assert halved.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert halved.pos_embed.dtype == torch.float32
    assert halved.fingerprint == whole.fingerprint


def test_the_map_of_a_teacher_with_other_patches_is_interpolated():
    torch.manual_seed(0)
    teacher = pixio.PixioViT(img_size=64, patch_size=8, embed_dim=16, depth=1, num_heads=2).eval()
    images = torch.randn(2, 3, 64, 64)
    fine = teacher(images)[-1]["patch_tokens"].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    tokens = teacher_tokens(teacher, images, (4, 4))
    assert tokens.patch.shape == (2, 16, 16)
    expected = torch.nn.functional.interpolate(fine, size=(4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(tokens.patch.unflatten(1, (4, 4)).permute(0, 3, 1, 2), expected)


def test_a_teacher_of_timm_with_one_class_token_teaches(folder, tmp_path):
    torch.save(load_encoder("timm/test_vit").model.state_dict(), tmp_path / "test_vit.pth")
    teacher = f"--teacher_model timm/test_vit --teacher_pretrained {tmp_path}/test_vit.pth"
    run(folder, teacher, "--output_dir", tmp_path / "run", students=PICO)
    encoder = pixio.pixio_vitpico16(tmp_path / f"run/encoder_{PICO}.pth", img_size=64, n_cls_tokens=1)
    projector = torch.load(tmp_path / f"run/projector_{PICO}.pth", weights_only=True)
    assert projector["last_proj.0.weight"].shape == (64, encoder.embed_dim)


def test_a_transformers_folder_with_other_patches_teaches_when_resized(folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    flags = [f"--teacher_model hf/{tmp_path}/dinov2 --teacher_pretrained none --input_size 112"]
    flags += [f"--output_dir {tmp_path}/run --epochs 1"]
    with pytest.raises(SystemExit, match=r"grid of 8 x 8.*one of 7 x 7: add --resize_teacher"):
        run(folder, *flags)
    run(folder, *flags, "--resize_teacher")
    assert log_of(tmp_path / "run")[-1]["step"] == 2
    with pytest.raises(SystemExit, match="multiples of 112 fit teacher and students"):
        run(folder, *flags, "--resize_teacher --input_size 128 --output_dir", tmp_path / "other")


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked_run(folder) -> Path:
    """Two masked students with drop path and micro batches, never interrupted."""
    run(folder, MASKED, "--accum_iter 2 --output_dir", folder / "masked")
    return folder / "masked"


def test_exported_encoders_are_the_students_of_the_run(masked_run):
    students = checkpoint_of(masked_run)["students"]
    assert list(students) == [PICO, TI]
    for name, learnt in students.items():
        student = Student(pixio.create_model(name, img_size=64), teacher_dim=128).eval()
        student.load_state_dict(learnt["model"])
        exported = pixio.create_model(name, masked_run / f"encoder_{name}.pth", img_size=64).eval()
        images = torch.randn(2, 3, 64, 64)
        for key, value in student.encoder(images)[-1].items():
            assert torch.equal(value, exported(images)[-1][key]), key
        projector = torch.load(masked_run / f"projector_{name}.pth", weights_only=True)
        names = [f"last_proj.{i}.{part}" for i in (0, 1, 3) for part in ("weight", "bias")]
        assert list(projector) == names
        assert torch.equal(projector["last_proj.3.weight"], learnt["model"]["last_proj.3.weight"])


def test_a_student_speaks_after_its_final_norm_through_the_released_projector():
    student = Student(pixio.pixio_vitpico16(img_size=64), teacher_dim=48).eval()
    linear, norm, gelu, last = student.last_proj
    assert (linear.in_features, linear.out_features, last.in_features, last.out_features) == (128, 48, 48, 48)
    assert (type(norm), norm.eps, gelu.approximate) == (torch.nn.LayerNorm, 1e-5, "none")
    images = torch.randn(2, 3, 64, 64)
    features, tokens = student.encoder(images)[-1], student(images)
    assert tokens.cls.untyped_storage().data_ptr() != tokens.patch.untyped_storage().data_ptr()
    torch.testing.assert_close(tokens.cls, last(gelu(norm(linear(features["cls_tokens_norm"])))))
    torch.testing.assert_close(tokens.patch, last(gelu(norm(linear(features["patch_tokens_norm"])))))


def test_each_student_has_its_own_line_of_numbers(masked_run):
    rows = log_of(masked_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["images"] == 48
    for row in rows:
        losses = [student["loss"] for student in row["students"].values()]
        assert list(row["students"]) == [PICO, TI]
        assert losses[0] != losses[1]
        assert row["loss"] == pytest.approx(sum(losses) / 2)


def test_class_and_patch_loss_of_each_student_are_logged_and_printed(folder, masked_run, tmp_path, capsys):
    for row in log_of(masked_run):
        for student in row["students"].values():
            mean = (student["loss_cls"] + student["loss_patch"]) / 2
            assert student["loss"] == pytest.approx(mean)
            assert student["loss_cls"] != student["loss_patch"]
    run(folder, "--epochs 1 --loss_fuse sum --output_dir", tmp_path, students=PICO)
    student = log_of(tmp_path)[0]["students"][PICO]
    assert student["loss"] == pytest.approx((8 * student["loss_cls"] + 16 * student["loss_patch"]) / 24)
    assert (
        f"{PICO}/loss_cls {log_of(tmp_path)[-1]['students'][PICO]['loss_cls']:.4g}" in capsys.readouterr().out
    )


def released_student(folder: Path, path: Path) -> dict[str, Tensor]:
    """A file as the release's distillation writes it: encoder and `last_proj.*` together under `model`."""
    torch.manual_seed(7)
    student = Student(pixio.pixio_vitpico16(img_size=64), teacher_dim=128)
    weights = {key.removeprefix("encoder."): value for key, value in student.state_dict().items()}
    torch.save({"model": weights, "epoch": 3}, path)
    return student.state_dict()


def test_a_student_file_of_the_release_teaches_as_its_encoder_does(folder, tmp_path):
    weights = released_student(folder, tmp_path / "latest.pth")
    encoder = {key: value for key, value in weights.items() if not key.startswith("last_proj.")}
    torch.save({key.removeprefix("encoder."): value for key, value in encoder.items()}, tmp_path / "enc.pth")
    one, other = (
        load_teacher(PICO, str(tmp_path / name), ALONE.device, torch.float32)
        for name in ("latest.pth", "enc.pth")
    )
    assert one.fingerprint == other.fingerprint


def test_students_start_from_files_of_the_release_with_their_projectors(folder, tmp_path):
    weights = released_student(folder, tmp_path / "latest.pth")
    run(
        folder,
        "--iter_per_epoch 1 --epochs 1 --init_students",
        tmp_path / "latest.pth",
        "--output_dir",
        tmp_path,
        students=PICO,
    )
    assert_equal_states(checkpoint_of(tmp_path)["students"][PICO]["model"], weights)
    torch.save(pixio.pixio_vitpico16(img_size=64).state_dict(), tmp_path / "encoder.pth")
    Student(pixio.pixio_vitpico16(img_size=64), 128).load(str(tmp_path / "encoder.pth"))
    with pytest.raises(ValueError, match=r"latest.pth does not fit this model: other shapes: last_proj"):
        Student(pixio.pixio_vitpico16(img_size=64), 64).load(str(tmp_path / "latest.pth"))


def test_the_defaults_are_the_releases():
    config = main_distill.DistillConfig()
    assert (config.mask_ratio, config.blr, config.num_workers) == ((0.5,), (1e-3,), 10)
    assert (config.loss_fn_cls, config.loss_fn_patch, config.loss_fuse) == ("cosine", "cosine", "avg")


class Killed(BaseException):
    """Stands for a signal: nothing between the loop and the interpreter may catch it."""


@pytest.mark.parametrize("cached", [False, True], ids=["stream", "cache"])
def test_resumed_run_equals_uninterrupted_run(folder, masked_run, tmp_path, monkeypatch, cached):
    flags, whole = [MASKED, "--accum_iter 2"], masked_run
    if cached:
        flags, whole = [*flags, "--feature_cache", tmp_path / "cache"], tmp_path / "whole"
        run(folder, *flags, "--output_dir", whole)
    steps = iter(range(5))

    def apply_until_killed(*args):
        if next(steps, None) is None:
            pointer = tmp_path / "killed" / "checkpoints" / "latest"
            while pointer.read_text().strip() != "step_00000004":
                time.sleep(0.01)  # it is written in the background
            raise Killed
        return apply_gradients(*args)

    monkeypatch.setattr(main_distill, "apply_gradients", apply_until_killed)
    with pytest.raises(Killed):
        run(folder, *flags, "--output_dir", tmp_path / "killed")
    monkeypatch.undo()
    assert checkpoint_of(tmp_path / "killed")["step"] == 4
    run(folder, *flags, "--output_dir", tmp_path / "killed")
    one, other = checkpoint_of(whole), checkpoint_of(tmp_path / "killed")
    assert one["step"] == other["step"] == 6
    for name in (PICO, TI):
        assert_equal_states(one["students"][name]["model"], other["students"][name]["model"])
    assert [row["students"] for row in log_of(whole)] == [
        row["students"] for row in log_of(tmp_path / "killed")
    ]


def test_a_run_asked_to_stop_saves_all_students_and_leaves_with_the_status_to_be_run_again(
    folder, tmp_path, monkeypatch
):
    answers = iter([False, False, True])
    monkeypatch.setattr(signals, "received", lambda: next(answers))
    with pytest.raises(SystemExit) as stopped:
        run(folder, "--save_steps 0 --output_dir", tmp_path)
    assert stopped.value.code == 75
    assert checkpoint_of(tmp_path)["step"] == 3


def test_a_student_learns_the_same_alone_and_beside_another(folder, masked_run, tmp_path):
    flags = "--mask_ratio 0.25 --mask_grid 2 --drop_path 0.2 --accum_iter 2"
    run(folder, flags, "--output_dir", tmp_path, students=TI)
    alone, beside = checkpoint_of(tmp_path)["students"], checkpoint_of(masked_run)["students"]
    assert_equal_states(alone[TI]["model"], beside[TI]["model"])


def test_the_teacher_looks_once_at_each_batch_and_stays_bit_identical(folder, tmp_path, monkeypatch):
    teachers, looks = [], []

    def watched(*args):
        teachers.append(load_teacher(*args))
        teachers[0].register_forward_hook(lambda module, inputs, _: looks.append(module.training))
        return teachers[0]

    monkeypatch.setattr(main_distill, "load_teacher", watched)
    run(folder, "--weight_decay 0.5 --output_dir", tmp_path)
    assert looks == [False] * 6
    assert_equal_states(teachers[0].state_dict(), torch.load(folder / "teacher.pth", weights_only=True))
    assert all(p.grad is None and not p.requires_grad for p in teachers[0].parameters())


def masks_of(folder: Path, output: Path, monkeypatch, *flags: str) -> list[list[set[int]]]:
    """Visible patches of every image of the first step, by student."""
    keeps = []
    forward = Student.forward

    def watched(self, images, ids_keep=None):
        keeps.append([set(row) for row in ids_keep.tolist()])
        return forward(self, images, ids_keep)

    monkeypatch.setattr(Student, "forward", watched)
    run(folder, *flags, "--mask_grid 1 --epochs 1 --iter_per_epoch 1 --output_dir", output)
    monkeypatch.undo()
    return keeps


def test_students_draw_their_own_masks_or_share_nested_ones(folder, tmp_path, monkeypatch):
    first, second = masks_of(folder, tmp_path / "own", monkeypatch, "--mask_ratio 0.5 0.75")
    assert [len(visible) for visible in first + second] == [8] * 4 + [4] * 4
    assert not all(b <= a for a, b in zip(first, second, strict=True))
    shared = masks_of(folder, tmp_path / "shared", monkeypatch, "--mask_ratio 0.5 0.75 --share_masks")
    assert all(b <= a for a, b in zip(*shared, strict=True))
    assert len({frozenset(visible) for visible in shared[0]}) > 1


def test_learning_rates_may_be_given_or_derived_for_each_student(folder, tmp_path):
    run(folder, "--lr 1e-3 2e-3 --output_dir", tmp_path / "given")
    rates = [row["students"] for row in log_of(tmp_path / "given")]
    assert [rate[PICO]["lr"] for rate in rates[:3]] == [0, 5e-4, 1e-3]
    assert [rate[TI]["lr"] for rate in rates[:3]] == [0, 1e-3, 2e-3]
    run(folder, "--lr none --blr 0.016 0.032 --accum_iter 2 --output_dir", tmp_path / "derived")
    rates = log_of(tmp_path / "derived")[2]["students"]  # 8 images per step: 8 / 256 of blr
    assert [rates[PICO]["lr"], rates[TI]["lr"]] == pytest.approx([5e-4, 1e-3])


def test_a_student_comes_closer_to_its_teacher(folder, tmp_path):
    run(folder, "--epochs 20 --output_dir", tmp_path, students=PICO)
    losses = [row["loss"] for row in log_of(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


def test_a_loss_that_is_not_finite_stops_all_students_before_the_step(folder, tmp_path, monkeypatch):
    def poisoned(self, model, batch):
        loss = teach(self, model, batch)
        poison = len(log_of(tmp_path)) == 3 and model.encoder.embed_dim == 192
        return loss * float("nan") if poison else loss

    teach = StudentTrainer.loss_fn
    monkeypatch.setattr(StudentTrainer, "loss_fn", poisoned)
    with pytest.raises(SystemExit, match=f"the loss of {TI} is not finite"):
        run(folder, "--save_steps 0 --output_dir", tmp_path)
    assert checkpoint_of(tmp_path)["step"] == 3
    state = checkpoint_of(tmp_path)["students"]
    for name in (PICO, TI):
        exported = torch.load(tmp_path / f"encoder_{name}.pth", weights_only=True)
        assert all(torch.equal(value, state[name]["model"][f"encoder.{k}"]) for k, value in exported.items())
        assert {entry["step"].item() for entry in state[name]["optimizer"]["state"].values()} == {3}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student_models", PICO], "students? with|student_models"),
        (["--student_models", PICO, "pixio_vits16"], "student_models"),
        (["--teacher_model", TI], "teacher_model"),
        (["--n_cls_tokens", "8"], "n_cls_tokens"),
        (["--feature_cache", "cache"], "feature_cache"),
        (["--teacher_pretrained", "other_teacher.pth"], "a teacher of other weights"),
    ],
)
def test_another_run_is_not_resumed_into_a_folder(folder, masked_run, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=message) as stopped:
        run(folder, "--epochs 4 --mask_ratio 0.5 --output_dir", masked_run, *flags)
    assert "choose another --output_dir" in str(stopped.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--student_models pixio_vitz16", "must name different encoders of pixio_vit"),
        (f"--student_model {PICO} {PICO}", "must name different encoders"),
        (
            "--mask_ratio 0.5 0.5 0.5",
            "--mask_ratio takes one value for all or 2, one for each student; found 3",
        ),
        ("--mask_ratio 0.9 --mask_grid 2", "leaves none of 4 cells visible"),
        ("--mask_ratio 0.5 --mask_grid 3", "mask_grid 3 does not divide the patch grid 4 x 4"),
        ("--n_cls_tokens 4", "the teacher has 8 and the students have 4"),
        ("--teacher_pretrained none", "--teacher_pretrained is missing"),
        ("--teacher_pretrained /nowhere.pth", "/nowhere.pth"),
        (f"--teacher_model {TI}", "does not fit this model"),
        ("--teacher_model pixio_vitz16", "unknown encoder 'pixio_vitz16'"),
        ("--input_size 72", "multiples of"),
        ("--loss_fn_patch none", "must be one of cosine, l1, mse"),
        ("--loss_fn_cls l2", "must be one of none, cosine, l1, mse"),
        ("--feature_cache cache --dataset_type scenes", "scenes never end"),
        ("--data_path /nowhere", "/nowhere"),
    ],
)
def test_mistakes_are_one_clear_line_and_write_nothing(folder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(folder, "--output_dir", tmp_path / "run", flags)
    said = f"{stopped.value.code} {capsys.readouterr().err}"
    assert message in said
    assert stopped.value.code not in (0, None)
    assert not (tmp_path / "run").exists()


def test_a_pretraining_checkpoint_is_not_taken_for_a_distillation(folder, tmp_path):
    Checkpoints(tmp_path, ALONE).save(1, {"images": 4, "config": {}, "model": {}})
    with pytest.raises(SystemExit, match="step_00000001 is of another kind of run, without student_models"):
        run(folder, "--resume", tmp_path / "step_00000001", "--output_dir", tmp_path / "run")


def test_class_tokens_may_differ_when_they_are_not_compared(folder, tmp_path):
    run(folder, "--n_cls_tokens 4 --loss_fn_cls none --epochs 1 --output_dir", tmp_path, students=PICO)
    pixio.pixio_vitpico16(tmp_path / f"encoder_{PICO}.pth", img_size=64, n_cls_tokens=4)


# --- ranks --------------------------------------------------------------------------------------------------


def run_rank(rank: int, folder: Path, root: Path) -> None:
    """All that is tried on two ranks, in one start of them."""
    learn(rank, 2, root)
    programs = {
        "stream": MASKED,
        "cache": f"--feature_cache {root}/features",
        "sharded": f"--feature_cache {root}/sharded_features --parallel fsdp",
    }
    for name, flags in programs.items():
        rendezvous = f"--world_size 2 --local_rank {rank} --dist_url file://{root}/{name}_rendezvous"
        run(folder, flags, rendezvous, "--output_dir", root / name)


def learn(rank: int, world_size: int, folder: Path) -> None:
    """Two steps of two students on this rank's share of eight images; then rank 1 meets a NaN."""
    torch.set_num_threads(1)
    runtime = start_runtime("cpu", "fp32", world_size, rank, f"file://{folder}/rendezvous")
    torch.manual_seed(0)
    # In float64: where a gradient should be 0 (key biases), Adam makes whole steps of the rounding errors
    images, noise = torch.randn(3, 8, 3, 64, 64).double(), torch.rand(3, 8, 4)
    targets = torch.randn(3, 8, 24, 32)
    trainers = []
    for width, mask_ratio in ((16, 0.5), (32, 0.0)):
        encoder = pixio.PixioViT(64, embed_dim=width, depth=2, num_heads=2)
        objective = Objective(
            (4, 4), mask_ratio, 2, {"loss_fn_cls": "cosine", "loss_fn_patch": "mse", "loss_fuse": "sum"}
        )
        student = Student(encoder, 32).double()
        trainers.append(StudentTrainer(f"student{width}", student, objective, 1e-3, runtime, 0.05))
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)

    def step(number: int, poison: float = 1.0) -> None:
        tokens = Tokens(targets[number, share, :8], targets[number, share, 8:])
        batch = Batch(images[number, share], tokens, noise[number, share])
        gradients = {}
        for trainer in trainers:
            factor = poison if trainer is trainers[1] and rank == 1 else 1.0
            gradients[trainer.name] = compute_gradients(
                runtime,
                trainer.model,
                trainer.optimizer,
                trainer.scaler,
                [batch],
                lambda model, batch, trainer=trainer, factor=factor: trainer.loss_fn(model, batch) * factor,
            )
        apply_gradients(runtime, gradients)

    step(0)
    step(1)
    found = {trainer.name: trainer.student.state_dict() for trainer in trainers}
    torch.save(found, folder / f"{world_size}_{rank}.pt")
    if world_size > 1:
        try:
            step(2, float("nan"))
        except NonFiniteLoss as error:
            unchanged = all(
                torch.equal(value, found[trainer.name][key])
                for trainer in trainers
                for key, value in trainer.student.state_dict().items()
            )
            torch.save({"said": str(error), "unchanged": unchanged}, folder / f"refused_{rank}.pt")
    runtime.close()


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (folder, root), nprocs=2)
    return root


def test_two_gloo_ranks_equal_one_process_with_the_double_batch(two_ranks):
    learn(0, 1, two_ranks)
    one, two = (torch.load(two_ranks / f"{n}_0.pt", weights_only=True) for n in (1, 2))
    for student, state in one.items():
        for name, value in state.items():
            torch.testing.assert_close(value, two[student][name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_nan_of_one_student_on_one_rank_stops_all_students_on_all_ranks(two_ranks):
    for rank in range(2):
        found = torch.load(two_ranks / f"refused_{rank}.pt", weights_only=True)
        assert "the loss of student32 is not finite (rank 1: nan)" in found["said"]
        assert found["unchanged"]


def test_two_ranks_with_a_cache_equal_one_process_with_the_double_batch(folder, two_ranks, tmp_path):
    cache = f"--feature_cache {two_ranks}/features"
    run(folder, cache, "--batch_size 8 --output_dir", tmp_path)
    for one, two in zip(log_of(tmp_path), log_of(two_ranks / "cache"), strict=True):
        assert one["images"] == two["images"]
        for name in (PICO, TI):
            assert one["students"][name]["loss"] == pytest.approx(two["students"][name]["loss"], rel=1e-4)


def test_ranks_with_shards_of_the_students_share_a_cache(two_ranks):
    losses = [[row["loss"] for row in log_of(two_ranks / name)] for name in ("cache", "sharded")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_ranks_train_and_one_process_takes_over(folder, two_ranks):
    output = two_ranks / "stream"
    assert [row["images"] for row in log_of(output)] == [8, 16, 24, 32, 40, 48]
    run(folder, MASKED, "--epochs 4 --output_dir", output)
    assert [row["images"] for row in log_of(output)][-2:] == [52, 56]


# --- feature cache ------------------------------------------------------------------------------------------


def cache_of(
    folder: Path, root: Path, teacher: str = "teacher.pth", size: int = 64, runtime: Runtime = ALONE
) -> Cache:
    stream = open_stream("folder", str(folder / "images" / "train"), size=size, batch_size=5)
    encoder = load_teacher(PICO, str(folder / teacher), ALONE.device, ALONE.dtype)
    return open_cache(root, stream, encoder, (size // 16, size // 16), runtime)


def test_cached_tokens_are_the_teachers_for_central_crops(folder, tmp_path):
    images, tokens, failed = cache_of(folder, tmp_path)
    files = (folder / "images" / "train").rglob("*.JPEG")
    crops = [resize_center_crop(decode(file.read_bytes()), 64, 64) for file in files]
    assert len(images) == len(crops) == 12
    assert not failed
    images = images[:]
    assert {crop.numpy().tobytes() for crop in crops} == {image.numpy().tobytes() for image in images}
    teacher = pixio.pixio_vitpico16(folder / "teacher.pth", img_size=64).eval()
    with torch.no_grad():
        expected = teacher(normalize(images))[-1]
    expected = torch.cat([expected["cls_tokens"], expected["patch_tokens"]], 1)
    torch.testing.assert_close(tokens[:].float(), expected, atol=1e-2, rtol=1e-2)


def test_a_complete_cache_is_read_and_not_written_again(folder, tmp_path, monkeypatch):
    first = cache_of(folder, tmp_path)
    monkeypatch.setattr(feature_cache, "teacher_tokens", None)
    second = cache_of(folder, tmp_path)
    assert all(torch.equal(one[:], other[:]) for one, other in zip(first[:2], second[:2], strict=True))


def test_features_of_another_teacher_size_or_data_are_never_reused(folder, tmp_path):
    cache_of(folder, tmp_path / "cache")
    with pytest.raises(ValueError, match="with other teacher: choose another folder"):
        cache_of(folder, tmp_path / "cache", teacher="other_teacher.pth")
    with pytest.raises(ValueError, match="with other size, grid"):
        cache_of(folder, tmp_path / "cache", size=32)
    shutil.copytree(folder / "images", tmp_path / "images")
    shutil.copy(folder / "teacher.pth", tmp_path)
    next((tmp_path / "images").rglob("*.JPEG")).unlink()
    with pytest.raises(ValueError, match="with other data"):
        cache_of(tmp_path, tmp_path / "cache")


def test_a_killed_cache_keeps_its_complete_parts_and_a_damaged_part_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "PART", 5)
    calls = []

    def killed(*args):
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise Killed
        return teacher_tokens(*args)

    monkeypatch.setattr(feature_cache, "teacher_tokens", killed)
    with pytest.raises(Killed):
        cache_of(folder, tmp_path / "killed")
    assert len(cache_of(folder, tmp_path / "killed")[0]) == 12
    assert calls == [5, 5, 5, 2]
    whole, resumed = cache_of(folder, tmp_path / "whole"), cache_of(folder, tmp_path / "killed")
    for one, other in zip(whole[:2], resumed[:2], strict=True):
        assert torch.equal(one[:], other[:])
    os.truncate(tmp_path / "killed/part_000001.safetensors", 100)
    with pytest.raises(ValueError, match=r"part_000001\.safetensors is damaged .*: delete it"):
        cache_of(folder, tmp_path / "killed")
    (tmp_path / "killed/part_000001.safetensors").unlink()
    assert torch.equal(cache_of(folder, tmp_path / "killed").tokens[:], whole.tokens[:])


def test_a_cache_of_an_earlier_version_is_refused_by_name(folder, tmp_path):
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(ValueError, match="earlier version: choose another folder, or remove this one"):
        cache_of(folder, tmp_path)


def test_images_that_cannot_be_read_are_left_out_of_a_cache(folder, tmp_path, capsys):
    shutil.copytree(folder / "images", tmp_path / "images")
    shutil.copy(folder / "teacher.pth", tmp_path)
    file = next((tmp_path / "images").rglob("*.JPEG"))
    file.write_bytes(b"no image")
    damaged = file.name
    flags = f"--feature_cache {tmp_path}/cache --output_dir {tmp_path}/run"
    run(tmp_path, flags, students=PICO)
    assert "1 images or tars cannot be read and are left out" in capsys.readouterr().out
    images, tokens, failed = cache_of(tmp_path, tmp_path / "cache")
    assert len(images) == len(tokens) == 11
    (report,) = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report == {"counts": {"seen": 24, "kept": 24}, "errors": failed}
    assert damaged in failed[0]


def test_complete_members_of_damaged_tars_are_cached_and_the_tars_named(folder, tmp_path):
    write_tree("imagenet-tars", tmp_path / "tars", 12, 0, size=64, per_tar=4)
    os.truncate(tmp_path / "tars" / "imagenet1k-train-0001.tar", 5000)  # one image and a half
    os.truncate(tmp_path / "tars" / "imagenet1k-train-0002.tar", 300)
    stream = open_stream("imagenet", str(tmp_path / "tars"), size=64, batch_size=5)
    teacher = load_teacher(PICO, str(folder / "teacher.pth"), ALONE.device, ALONE.dtype)
    images, _, failed = open_cache(tmp_path / "cache", stream, teacher, (4, 4), ALONE)
    assert len(images) == 5
    assert [line.split(":")[0] for line in failed] == [f"imagenet1k-train-000{i}.tar" for i in (1, 2)]


def test_a_pass_over_a_cache_visits_every_image_once_on_any_number_of_ranks():
    images = torch.arange(12).view(12, 1, 1, 1)
    stream = open_stream("scenes", None, size=16, batch_size=2, seed=3)

    def visits(world_size: int, seen: int, steps: int) -> list[int]:
        ranks = [
            iter(CachedBatches(Cache(images, images), stream, rank, world_size, seen))
            for rank in range(world_size)
        ]
        return [
            visit for _ in range(steps) for rank in ranks for visit in next(rank)["images"].flatten().tolist()
        ]

    alone = visits(1, 0, 12)
    assert sorted(alone[:12]) == sorted(alone[12:]) == list(range(12))
    assert alone[:12] != alone[12:]
    assert visits(2, 0, 6) == alone
    assert visits(3, 6, 3) == alone[6:]


# --- scripts ------------------------------------------------------------------------------------------------

SCRIPTS = sorted((ROOT / "distillation" / "scripts").glob("*.sh"))


@pytest.fixture
def stubs(tmp_path):
    return echoing_programs(
        tmp_path, TEACHER="t.pth", IMAGENET_TARS="/tars", WEB_TARS="/web", WEB_STATS="/stats"
    )


def parsed(script: Path, env: dict) -> tuple[main_distill.DistillConfig, dict[str, str]]:
    """The configuration a script asks for, and its launcher flags."""
    flags, launcher = flags_of_script(script, env)
    return main_distill.parse(main_distill.DistillConfig, flags), launcher


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_valid_bash_and_their_flags_parse(script, stubs):
    subprocess.run(["bash", "-n", script], check=True)
    config, _ = parsed(script, stubs)
    assert config.teacher_pretrained == "t.pth"
    header = script.read_text().split("\nset -e")[0]
    assert all(word in header for word in ("command", "hardware", "hours", "expect"))


LARGE = (("pixio_vit1b16", "pixio_vith16"), (0.5,), (0.4,))
SMALL = (("pixio_vitl16", "pixio_vitb16"), (0.0,), (0.1,))


@pytest.mark.parametrize(
    ("name", "dataset", "expected"),
    [
        ("distill_pixio_vit5b16_to_vit1b16+vith16_imagenet", ("imagenet", "/tars", None), LARGE),
        ("distill_pixio_vit5b16_to_vit1b16+vith16_webdata", ("webdataset", "/web", "/stats"), LARGE),
        ("distill_pixio_vit5b16_to_vitl16+vitb16_imagenet", ("imagenet", "/tars", None), SMALL),
    ],
)
def test_published_recipes_are_the_published_numbers(stubs, name, dataset, expected):
    config, launcher = parsed(ROOT / "distillation" / "scripts" / f"{name}.sh", stubs)
    gpus = int(launcher["nodes"]) * int(launcher["ngpus"])
    assert (gpus, config.images_per_step(gpus)) == (128, 8192)
    assert (config.dataset_type, config.data_path, config.json_path) == dataset
    assert (config.student_models, config.mask_ratio, config.drop_path) == expected
    assert (config.teacher_model, config.mask_grid, config.peak_lr(gpus, 1)) == ("pixio_vit5b16", 4, 1e-3)
    assert (config.epochs, config.iters_per_epoch, config.warmup_epochs) == (400, 1605, 40)
    assert (config.weight_decay, config.save_freq, config.input_size) == (0.05, 20, 256)
    assert config.soft_sampling == (dataset[0] == "webdataset")


def test_the_derived_learning_rate_of_the_published_batch_is_the_published_one():
    config = main_distill.DistillConfig(batch_size=64, blr=(3.125e-5,))
    assert config.peak_lr(128) == pytest.approx(1e-3)


def test_a_cluster_script_without_a_cluster_says_so(stubs, tmp_path):
    (tmp_path / "sbatch").unlink()
    env = {**stubs, "PATH": str(tmp_path)}
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    for script in SCRIPTS:
        result = subprocess.run(["/bin/bash", script], env=env, capture_output=True, text=True, check=False)
        assert (result.returncode == 0) == ("onegpu" in script.name)
        assert ("No SLURM here (sbatch not found)" in result.stderr) != ("onegpu" in script.name)
