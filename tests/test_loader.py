"""The loader: every image once per epoch, exact resumption, damage counted, no process left behind."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import damage, encoded, numbers, photographs, png, stream_of, take, write_tars
from PIL import Image

from pixio.data import DataError, Loader, open_stream
from pixio.data import stream as stream_module
from pixio.data.tar_index import Entry
from pixio.images.crops import decode_crop


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_every_image_once_per_epoch(tmp_path, workers):
    write_tars(tmp_path, [5, 9, 7, 3])
    seen = Counter()
    for rank in range(2):
        loader = Loader(stream_of(tmp_path, 1), rank=rank, world_size=2, num_workers=workers)
        own = loader.world_size * max(workers, 1)
        lengths = [
            sum(len(group.entries(lambda s: [Entry("")] * [5, 9, 7, 3][s])) for group in groups)
            for groups in loader._sampler.assign(0)[rank * own // 2 : (rank + 1) * own // 2]
        ]
        # the readers of a rank alternate: reader r gives batches r, r + W, …
        taken = take(loader, max(lengths) * len(lengths))
        for reader, length in enumerate(lengths):
            seen.update(batch[0] for batch in taken[reader :: len(lengths)][:length])
    assert seen == dict.fromkeys(range(24), 1)


def test_fewer_shards_than_workers_are_shared(tmp_path):
    write_tars(tmp_path, [40])
    seen = set()
    for batch in take(Loader(stream_of(tmp_path, 1), num_workers=2), 40):
        seen.update(batch)
    assert len(seen) == 40


def test_batches_are_uint8_crops(tmp_path):
    batch = next(iter(Loader(stream_of(write_tars(tmp_path, [6])))))
    assert list(batch) == ["images"]
    assert batch["images"].dtype == torch.uint8
    assert batch["images"].shape == (4, 3, 4, 4)


@pytest.mark.parametrize(("workers", "stops"), [(0, (1, 4, 11)), (2, (3, 6))])
def test_resumed_run_equals_uninterrupted_run(tmp_path, workers, stops):
    stream = stream_of(write_tars(tmp_path, [9, 14, 11]), shuffle_shards=2)
    whole = take(Loader(stream, num_workers=workers), 16)
    for stop in stops:
        interrupted = Loader(stream, num_workers=workers)
        assert take(interrupted, stop) == whole[:stop]
        state = json.loads(json.dumps([interrupted.state_dict()]))
        assert take(Loader(stream, num_workers=workers, state=state), 16 - stop) == whole[stop:]


def test_resumed_crops_equal_uninterrupted_crops(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)).save(tmp_path / f"{i}.png")
    stream = open_stream("folder", str(tmp_path), size=16, batch_size=5)
    whole = [batch["images"] for batch in islice(Loader(stream), 6)]
    interrupted = Loader(stream)
    take(interrupted, 4)
    resumed = [batch["images"] for batch in islice(Loader(stream, state=[interrupted.state_dict()]), 2)]
    assert torch.equal(torch.stack(resumed), torch.stack(whole[4:]))


@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_chain_of_interruptions_leaves_the_sequence_unchanged(data, seed, tmp_path_factory):
    root = tmp_path_factory.getbasetemp() / "chain"
    if not root.exists():
        write_tars(root, [9, 14, 1, 11])
    stream = stream_of(root, 3, shuffle_shards=2, seed=seed)  # batches and buffers end at different places
    whole = take(Loader(stream), 24)
    loader, done = Loader(stream), 0
    while done < 24:
        count = data.draw(st.integers(1, 12))
        assert take(loader, count)[: 24 - done] == whole[done : done + count]
        done += count
        loader = Loader(stream, state=[loader.state_dict()])


def test_loader_continues_when_iterated_again(tmp_path):
    stream = stream_of(write_tars(tmp_path, [9, 14]))
    loader = Loader(stream, num_workers=2)
    assert take(loader, 3) + take(loader, 2) == take(Loader(stream, num_workers=2), 5)


def test_resuming_decodes_nothing_that_it_skips(tmp_path, monkeypatch):
    stream = stream_of(write_tars(tmp_path, [200]))
    interrupted = Loader(stream)
    take(interrupted, 40)
    decoded = []
    monkeypatch.setattr(
        stream_module, "decode_crop", lambda *args, **kw: decoded.append(args) or decode_crop(*args, **kw)
    )
    take(Loader(stream, state=[interrupted.state_dict()]), 1)
    assert len(decoded) == 4


def test_resuming_on_other_ranks_and_workers_finishes_the_epoch_exactly(tmp_path):
    sizes = [13, 8, 21, 10, 8]
    stream = stream_of(write_tars(tmp_path, sizes), 1, shuffle_shards=2)
    seen, states = Counter(), []
    for rank in range(2):
        loader = Loader(stream, rank=rank, world_size=2, num_workers=2)
        seen.update(batch[0] for batch in take(loader, 10 + rank))
        states.append(loader.state_dict())
    assert set(seen.values()) == {1}

    for rank in range(3):
        loader = Loader(stream, rank=rank, world_size=3, state=states[::-1])
        for batch in loader:
            if loader.state_dict()["positions"][0][0] > 0:
                break
            seen.update(numbers(batch))
    assert seen == dict.fromkeys(range(sum(sizes)), 1)


def test_state_of_a_changed_run_is_itself_resumable(tmp_path):
    stream = stream_of(write_tars(tmp_path, [13, 8, 21]), 1)
    first = Loader(stream, num_workers=2)
    take(first, 15)
    changed = Loader(stream, state=[first.state_dict()])
    head = take(changed, 6)
    resumed = Loader(stream, state=json.loads(json.dumps([changed.state_dict()])))
    tail = take(resumed, 50)
    assert head + tail == take(Loader(stream, state=[first.state_dict()]), 56)
    assert Loader(stream, state=[resumed.state_dict()]).state_dict()["past"] is None  # the old epoch is over


def test_incomplete_state_is_refused(tmp_path):
    stream = stream_of(write_tars(tmp_path, [6]))
    state = Loader(stream, rank=1, world_size=2).state_dict()
    with pytest.raises(ValueError, match=r"each of the 2 ranks.*found ranks \[1\]"):
        Loader(stream, state=[state])


def test_state_of_another_stream_is_refused(tmp_path):
    state = Loader(stream_of(write_tars(tmp_path, [6]))).state_dict()
    with pytest.raises(ValueError, match="seed 0 -> 5"):
        Loader(stream_of(tmp_path, seed=5), state=[state])
    write_tars(tmp_path, [6, 6])
    with pytest.raises(ValueError, match="shards 1 -> 2"):
        Loader(stream_of(tmp_path), state=[state])


def test_global_randomness_is_left_alone(tmp_path):
    stream = stream_of(write_tars(tmp_path, [6]))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(Loader(stream), 2)
    assert torch.equal(torch.rand(3), expected)


def test_stream_decodes_exactly_when_asked(tmp_path):
    write_tar(tmp_path / "a-train-0.tar", {"0.jpg": encoded(photographs()["coffee"], "jpeg", quality=60)})
    fast, exact = (
        next(iter(Loader(open_stream("imagenet", str(tmp_path), size=64, batch_size=1, decode=way))))[
            "images"
        ]
        for way in ("fast", "exact")
    )
    assert not torch.equal(fast, exact)
    assert (fast.int() - exact.int()).abs().float().mean() <= 2


DAMAGES = [
    "empty",
    "not a tar",
    "no image",
    "negative size",
    "huge size",
    "huge name",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_tar_is_skipped_and_counted(tmp_path, how):
    write_tars(tmp_path, [10, 10, 10])
    damage(tmp_path / "set-train-001.tar", how)
    loader = Loader(stream_of(tmp_path, 20))
    for batch in take(loader, 2):
        assert sorted(batch) == [*range(10), *range(20, 30)]
    assert loader.counts["bad_shard"] == 2  # once in each epoch
    assert "set-train-001.tar" in loader.errors[0]


@pytest.mark.parametrize(("how", "left"), [("truncated", 9), ("broken header", 2)])
def test_images_before_the_damage_of_a_tar_are_used_and_the_loss_is_counted(tmp_path, how, left):
    write_tars(tmp_path, [10, 10, 10])
    damage(tmp_path / "set-train-001.tar", how)
    loader = Loader(stream_of(tmp_path, 20 + left))
    for batch in take(loader, 2):
        assert sorted(batch) == [*range(10 + left), *range(20, 30)]
    assert (loader.counts["incomplete_shard"], loader.counts["bad_shard"]) == (2, 0)
    assert f"the {left} images before it are used" in loader.errors[0]


def test_damaged_image_is_skipped_named_and_logged_at_a_bounded_rate(tmp_path, caplog):
    members = {f"{i:03d}.png": png(i) if i % 8 else png(i)[:40] for i in range(100)}
    write_tar(tmp_path / "a-train-0.tar", members)
    loader = Loader(stream_of(tmp_path, 87))
    with caplog.at_level("WARNING"):
        for batch in take(loader, 2):
            assert sorted(batch) == [i for i in range(100) if i % 8]
    assert 13 <= loader.counts["bad_image"] <= 26
    assert any("a-train-0.tar: '008.png'" in message for message in loader.errors)
    assert len(caplog.records) == 1


def test_error_budget_stops_the_run_and_names_the_last_failures(tmp_path):
    members = {f"{i:03d}.png": png(i) if i % 3 else b"?" for i in range(250)}
    write_tar(tmp_path / "a-train-0.tar", members)
    with pytest.raises(DataError, match=r"above the error budget 0\.2(.|\n)*a-train-0\.tar"):
        take(Loader(stream_of(tmp_path, 1)), 500)
    take(Loader(stream_of(tmp_path, 1, error_budget=0.5)), 500)


def test_storage_that_fails_stops_the_run_soon(tmp_path):
    write_tar(tmp_path / "a-train-0.tar", {f"{i:03d}.png": b"?" for i in range(120)})
    with pytest.raises(DataError, match="50 failures in a row"):
        take(Loader(stream_of(tmp_path, 1, error_budget=1.0)), 1)


def test_set_of_damaged_tars_only_is_an_error(tmp_path):
    write_tars(tmp_path, [3, 3])
    for path in tmp_path.iterdir():
        damage(path, "not a tar")
    with pytest.raises(DataError, match="bad_shard 2"):
        take(Loader(stream_of(tmp_path, 1)), 1)


def test_error_in_a_worker_process_reaches_the_loop(tmp_path):
    write_tar(tmp_path / "a-train-0.tar", {f"{i:03d}.png": b"?" for i in range(120)})
    with pytest.raises(DataError, match=r"failures in a row|gives no image"):
        take(Loader(stream_of(tmp_path, 1), num_workers=2), 1)


def test_damaged_set_is_read_to_the_end_and_everything_damaged_is_named(tmp_path):
    """Of 50 tars 5 are truncated, 1 is empty, 1 is no tar; 5 % of the images elsewhere are damaged."""
    write_tars(tmp_path, [20] * 50)
    broken = {7: "empty", 8: "not a tar"} | dict.fromkeys((3, 13, 23, 33, 43), "truncated")
    for i in range(50):
        path = tmp_path / f"set-train-{i:03d}.tar"
        if i in broken:
            damage(path, broken[i])
            continue
        members = {f"{n:05d}.png": png(n) for n in range(20 * i, 20 * i + 20)}
        members[f"{20 * i + i % 20:05d}.png"] = png(0)[:40]
        write_tar(path, members)
    loader = Loader(stream_of(tmp_path, 43 * 19), num_workers=2)
    passes = [image for batch in take(loader, 4) for image in batch]
    assert max(Counter(passes).values()) <= 5  # a reader may be one epoch ahead
    expected = {f"set-train-{i:03d}.tar" for i in broken}
    expected |= {f"{20 * i + i % 20:05d}.png" for i in range(50) if i not in broken}
    assert {name for error in loader.errors for name in expected if name in error} == expected
    assert len(loader.errors) == len(expected)


def test_dead_worker_is_reported_with_shard_and_member(tmp_path, monkeypatch):
    write_tars(tmp_path, [12, 12])
    victim = png(17)

    def read(data, *args, **options):
        if data == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode_crop(data, *args, **options)

    monkeypatch.setattr(stream_module, "decode_crop", read)
    with pytest.raises(
        DataError, match=r"worker process died while it read set-train-001\.tar: '00017\.png'"
    ):
        take(Loader(stream_of(tmp_path), num_workers=2), 100)


@pytest.mark.parametrize("free", [10**12, 1000])
def test_batches_come_whatever_room_shared_memory_has(tmp_path, monkeypatch, free):
    stream = stream_of(write_tars(tmp_path, [9, 14]))
    expected = take(Loader(stream, num_workers=2), 6)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    loader = Loader(stream, num_workers=2)
    with pytest.warns(UserWarning, match="--shm-size") if free < 10**6 else nullcontext():
        assert take(loader, 6) == expected
    batch = next(iter(loader))["images"]
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_batches_come_when_shared_memory_becomes_full(tmp_path, monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    stream = stream_of(write_tars(tmp_path, [9, 14]))
    expected = take(Loader(stream), 4)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert take(Loader(stream, num_workers=1), 4) == expected


def test_more_consumers_than_images_get_images_all_the_same(tmp_path):
    write_tars(tmp_path, [1, 2])
    stream = stream_of(tmp_path, 2)
    for rank in (0, 7, 59):
        assert set(take(Loader(stream, rank=rank, world_size=60), 3)[2]) <= {0, 1, 2}


def test_tars_listed_one_by_one_resume_under_another_name(tmp_path, monkeypatch):
    root = write_tars(tmp_path / "disk", [9, 14])
    monkeypatch.chdir(tmp_path)
    options = {"size": 4, "batch_size": 4}
    relative = open_stream("webdataset", "disk/set-train-{000..001}.tar", **options)
    loader = Loader(relative)
    take(loader, 3)
    state, rest = [loader.state_dict()], take(loader, 5)
    root.rename(tmp_path / "moved")
    moved = str(tmp_path / "moved/set-train-{000..001}.tar")
    for kind, path in (("webdataset", moved), ("imagenet", moved), ("imagenet", "moved")):
        assert take(Loader(open_stream(kind, path, **options), state=state), 5) == rest


@pytest.mark.parametrize("path", ["disk/set-train-000.tar", "{root}/disk/set-train-000.tar"])
def test_states_that_name_tars_by_their_location_are_read(tmp_path, monkeypatch, path):
    write_tars(tmp_path / "disk", [9])
    monkeypatch.chdir(tmp_path)
    path = path.format(root=tmp_path)
    stream = open_stream("webdataset", path, size=4, batch_size=4)
    state = Loader(stream).state_dict()
    state["stream"]["shard_names"] = hashlib.sha256(path.encode()).hexdigest()[:16]
    resumed = Loader(stream, state=[state])
    assert resumed.stream.shards[0].name == path  # crops are drawn as in that run
    assert resumed.state_dict() == state


def test_no_process_is_left_when_the_reader_stops(tmp_path):
    write_tars(tmp_path, [12, 12])
    before = set(multiprocessing.active_children())
    batches = iter(Loader(stream_of(tmp_path), num_workers=2))
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("free", [10**12, 0])
def test_no_process_is_left_when_the_reader_is_killed(tmp_path, free):
    write_tars(tmp_path, [12, 12])
    code = f"""
import multiprocessing, shutil, time, types
from pixio.data import Loader, open_stream
shutil.disk_usage = lambda path: types.SimpleNamespace(free={free})
batches = iter(Loader(open_stream("imagenet", {str(tmp_path)!r}, size=256, batch_size=4), num_workers=2))
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in reader.stdout.readline().split()]
    reader.kill()
    reader.wait()
    reader.stdout.close()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, f"{workers} outlive the process that they read for"
        time.sleep(0.2)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a container without an init process keeps its orphans as zombies
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def test_unreadable_file_of_a_folder_is_counted(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    stream = open_stream("folder", str(tmp_path), size=4, batch_size=5)
    (tmp_path / "3.png").unlink()
    loader = Loader(stream)
    assert sorted(take(loader, 1)[0]) == [0, 1, 2, 4, 5]
