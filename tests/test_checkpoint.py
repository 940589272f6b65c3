"""Checkpoints: killed, damaged, pruned, forged and read back; intervals."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import ALONE, equal, full_disk, squares, step_images, tiny_model, weights, zero

from pixio.engine import checkpoint as checkpoint_module
from pixio.engine.checkpoint import Checkpoints, Interval, materialize, read_checkpoint, restore
from pixio.engine.host_copies import HostCopies
from pixio.engine.optim import make_adamw
from pixio.engine.step import accumulate
from pixio.weights.reading import read_file

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
    state = materialize(Checkpoints(mistreated / instant, ALONE).load_latest())
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
    assert "(4,194,304 bytes needed, " in message
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


def test_an_export_needs_no_file_and_no_memory_of_its_own(tmp_path, monkeypatch):
    exported, written, real = [], [], checkpoint_module.write_tensors

    def note(folder, tensors, group):
        written.extend(rows.data_ptr() for _, rows in tensors.values())
        return real(folder, tensors, group)

    monkeypatch.setattr(checkpoint_module, "write_tensors", note)
    monkeypatch.setattr(safetensors, "safe_open", lambda *_, **__: pytest.fail("read again"))
    monkeypatch.setattr(torch, "save", lambda content, _: exported.append(content))
    Checkpoints(tmp_path, ALONE).save(1, {"value": torch.ones(3)}, {tmp_path / "export": lambda state: state})
    assert exported[-1]["value"].data_ptr() in written


def test_a_save_uses_the_memory_of_the_one_before(tmp_path):
    copies = HostCopies(torch.device("cpu"))
    first, _ = copies.copy({"same": torch.zeros(3), "grows": torch.zeros(2)})
    second, finish = copies.copy({"same": torch.ones(3), "grows": torch.ones(4), "new": torch.ones(())})
    finish()
    assert second["same"].data_ptr() == first["same"].data_ptr()
    assert [tensor.tolist() for tensor in second.values()] == [[1.0] * 3, [1.0] * 4, 1.0]


def test_what_changes_after_a_save_was_called_is_not_saved(tmp_path):
    checkpoints, value = Checkpoints(tmp_path, ALONE), torch.zeros(3)
    checkpoints.save(1, {"value": value}, wait=False)
    value.fill_(7)
    checkpoints.wait()
    assert materialize(checkpoints.load_latest())["value"].tolist() == [0.0] * 3


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


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("now", [False, True])
def test_a_run_resumes_in_fp16_whatever_it_computed_in(tmp_path, before, now):
    """Only fp16 has a scaler to save."""
    model = tiny_model()
    optimizer = make_adamw(model, 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=before)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    Checkpoints(tmp_path, ALONE).save(1, state)
    resumed = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=now)
    restore(model, optimizer, Checkpoints(tmp_path, ALONE).load_latest(), resumed)
    assert resumed.get_scale() == (1 if not now else 512 if before else 8)


def test_optimizer_and_model_state_come_back_equal(tmp_path):
    model = tiny_model()
    optimizer = make_adamw(model, 1e-2)
    accumulate(ALONE, model, optimizer, ALONE.make_scaler(), [step_images(0)], squares)
    Checkpoints(tmp_path, ALONE).save(1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    state = Checkpoints(tmp_path, ALONE).load_latest()

    other = tiny_model().apply(zero)
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
    assert "resume from step_00000010, write" in str(caught.value)


def as_in_the_hub(folder: Path, root: Path) -> Path:
    """The snapshot that the Hugging Face hub's cache makes of a folder: links to what it keeps by hash."""
    snapshot, blobs = root / "models--me--x/snapshots/abc/run", root / "models--me--x/blobs"
    return link_into(folder, snapshot, blobs)


def as_with_dvc(folder: Path, root: Path) -> Path:
    return link_into(folder, root / "runs" / folder.name, root / ".dvc/cache/files/md5/ab")


def as_with_git_annex(folder: Path, root: Path) -> Path:
    return link_into(folder, root / folder.name, root / ".git/annex/objects/Xq/1f")


def link_into(folder: Path, links: Path, store: Path) -> Path:
    links.mkdir(parents=True)
    store.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, store / f"{number:040x}")
        (links / file.name).symlink_to(os.path.relpath(store / f"{number:040x}", links))
    return links


@pytest.mark.parametrize("cache", [as_in_the_hub, as_with_dvc, as_with_git_annex])
def test_a_checkpoint_that_a_cache_keeps_as_links_is_read(tmp_path, cache):
    Checkpoints(tmp_path, ALONE).save(1, {"model": {"a": torch.ones(64)}})
    linked = cache(tmp_path / "step_00000001", tmp_path / "cache")
    assert torch.equal(read_file(linked)["model"]["a"], torch.ones(64))
    (linked / "rank_00000.safetensors").unlink()
    (linked / "rank_00000.safetensors").symlink_to(tmp_path / "step_00000001" / "rank_00000.safetensors")
    with pytest.raises(ValueError, match="leads out of"):
        read_file(linked)


@pytest.mark.parametrize("name", ["state.pt", "rank_00000.safetensors"])
def test_the_cache_of_another_project_is_outside(tmp_path, name):
    Checkpoints(tmp_path / "mine", ALONE).save(1, {"model": {"a": torch.ones(64)}})
    folder = tmp_path / "mine" / "step_00000001"
    for store in ("theirs/.dvc/cache", "theirs/models--x/blobs"):
        (tmp_path / store).mkdir(parents=True)
        shutil.copy(folder / name, tmp_path / store / "file")
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / store / "file")
        with pytest.raises(ValueError, match="leads out of"):
            read_file(folder)


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
    with pytest.raises(OSError, match=r"No space left on device \(268,435,456 bytes needed, 3 bytes free\)"):
        checkpoints.save(2, {"value": torch.empty(2**26)})
    assert checkpoints.load_latest()["step"] == 1


def test_an_interval_in_steps_is_due_on_its_multiples():
    interval = Interval(steps=3)
    assert [step for step in range(1, 10) if interval.due(step, late=False)] == [3, 6, 9]


def test_an_interval_without_steps_or_minutes_is_never_due():
    assert not any(Interval().due(step, Interval().late()) for step in range(10))
