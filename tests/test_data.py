"""Streams: each image once per pass, exact resumption, curation, damage, and faithful crops."""

import io
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tvf

from pixio.data import Curation, DataError, Loader, Stream, find_shards, open_stream
from pixio.data import stream as stream_module
from pixio.data.sampling import ResumedFrom, Sampler
from pixio.data.tar_index import Entry
from pixio.images import decoding, jpeg, normalization
from pixio.images.crops import crop_box, decode_crop, random_resized_crop, resize_center_crop
from pixio.images.decoding import DamagedDataError, decode
from pixio.images.normalization import denormalize, normalize

# Images of one colour, which a crop keeps: the colour is the image's number.


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number >> 8, number & 255, 77)).save(buffer, "png")
    return buffer.getvalue()


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    pixels = batch["images"][:, :, 0, 0].long()  # [B, 3]
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(root: Path, sizes: list[int], name: str = "set-train-{:03d}.tar") -> Path:
    """Tars with so many images each, numbered through, in the layout of the ImageNet tars."""
    first = 0
    for i, size in enumerate(sizes):
        members = {}
        for number in range(first, first + size):
            members |= {f"{number:05d}.png": png(number), f"{number:05d}.cls": b"3"}
        write_tar(root / name.format(i), members)
        first += size
    return root


def write_web(root: Path, records: list[dict], per_tar: int = 50) -> tuple[str, str]:
    """Web tars in two folders and their statistics; image i has record i, or none where that is None."""
    for i in range(0, len(records), per_tar):
        folder, stem = f"part{i // per_tar % 2}", f"{i // per_tar:04d}"
        chunk = range(i, min(i + per_tar, len(records)))
        write_tar(root / "tars" / folder / f"{stem}.tar", {f"{n:05d}.jpeg": png(n) for n in chunk})
        (root / "stats" / folder).mkdir(parents=True, exist_ok=True)
        statistics = {f"{n:05d}.jpeg": records[n] for n in chunk if records[n] is not None}
        (root / "stats" / folder / f"{stem}.json").write_text(json.dumps(statistics))
    return str(root / "tars"), str(root / "stats")


def good(**changes) -> dict:
    return {"histogram_score": 6.0, "mae_loss": 0.5, "width": 400, "height": 400} | changes


def stream_of(root: Path, batch_size: int = 4, **options) -> Stream:
    return open_stream("imagenet", str(root), size=4, batch_size=batch_size, **options)


def take(loader: Loader, batches: int) -> list[list[int]]:
    return [numbers(batch) for batch in islice(loader, batches)]


# -------------------------------------------------------------------------------- who reads what (no images)


class Consumers:
    """Index-level stand-ins of all consumers: they note (epoch, entry) and know where they stand."""

    def __init__(self, sampler: Sampler, sizes: list[int], first: int = 0) -> None:
        self.sampler, self.sizes = sampler, sizes
        self.positions = [(first, 0, 0)] * sampler.consumers
        self.seen: Counter = Counter()

    def index(self, shard: int) -> list[Entry]:
        return [Entry(f"{shard}/{i}") for i in range(self.sizes[shard])]

    def read(self, consumer: int, count: float, until_pass: int = 10**9) -> None:
        number, group, done = self.positions[consumer]
        while count > 0 and number < until_pass:
            groups = self.sampler.assign(number)[consumer]
            if group == len(groups):
                number, group, done = number + 1, 0, 0
                continue
            entries = groups[group].entries(self.index)
            end = int(min(len(entries), done + count))
            self.seen.update((number, entry.key) for _, entry in entries[done:end])
            count -= end - done
            done = end
            self.positions[consumer] = (number, group, done)
            if done == len(entries):
                group, done = group + 1, 0

    def successor(self, consumers: int) -> "Consumers":
        """Other consumers that go on from here."""
        past = ResumedFrom(self.sampler, tuple(self.positions))
        sampler = replace(self.sampler, consumers=consumers, resumed_from=past)
        after = Consumers(sampler, self.sizes, min(number for number, _, _ in self.positions))
        after.seen = self.seen
        return after


shard_sizes = st.lists(st.integers(0, 7), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(shard_sizes, st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_each_image_is_read_by_exactly_one_consumer_per_pass(sizes, consumers, shuffle, seed):
    readers = Consumers(Sampler(len(sizes), consumers, seed, shuffle), sizes)
    for consumer in range(consumers):
        readers.read(consumer, math.inf, until_pass=3)
    everything = {(n, f"{s}/{i}") for n in range(3) for s, size in enumerate(sizes) for i in range(size)}
    assert readers.seen == dict.fromkeys(everything, 1)


@settings(max_examples=100, deadline=None)
@given(st.data(), shard_sizes, st.integers(0, 99))
def test_passes_stay_exact_over_changes_of_topology(data, sizes, seed):
    total = sum(sizes)
    readers = Consumers(Sampler(len(sizes), data.draw(st.integers(1, 6)), seed, shuffle_shards=2), sizes)
    for _ in range(data.draw(st.integers(1, 3))):
        for consumer in range(readers.sampler.consumers):
            readers.read(consumer, data.draw(st.integers(0, 2 * total)))
        readers = readers.successor(data.draw(st.integers(1, 6)))
    last = max(number for number, _ in readers.seen) + 2 if readers.seen else 2
    for consumer in range(readers.sampler.consumers):
        readers.read(consumer, math.inf, until_pass=last)
    everything = {(n, f"{s}/{i}") for n in range(last) for s, size in enumerate(sizes) for i in range(size)}
    assert readers.seen == dict.fromkeys(everything, 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 1000))
def test_consumers_get_passes_of_nearly_equal_length(shards, consumers):
    units = shards * Sampler(shards, consumers, 0).parts
    assert -(-units // consumers) <= 1.25 * (units // consumers)


def test_shards_and_samples_are_reshuffled_every_pass():
    readers = Consumers(Sampler(40, 1, seed=0, shuffle_shards=4), [10] * 40)
    order = [
        [
            [entry.key for _, entry in group.entries(readers.index)]
            for group in readers.sampler.assign(number)[0]
        ]
        for number in (0, 1)
    ]
    assert [{key.split("/")[0] for key in group} for group in order[0]] != [
        {key.split("/")[0] for key in group} for group in order[1]
    ]
    positions = [{key: i for i, key in enumerate(chain(*groups))} for groups in order]
    pairs = np.array([[positions[0][key], positions[1][key]] for key in positions[0]])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.2  # 400 entries: 4 standard deviations
    # within a group the shards alternate instead of following each other
    changes = sum(a.split("/")[0] != b.split("/")[0] for a, b in pairwise(order[0][0]))
    assert changes > 20


def test_another_seed_gives_another_order():
    entries = [Entry(str(i)) for i in range(50)]
    groups = [Sampler(1, 1, seed).assign(0)[0][0] for seed in (0, 1)]
    assert groups[0].entries(lambda shard: entries) != groups[1].entries(lambda shard: entries)


# ------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_every_image_once_per_pass(tmp_path, workers):
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


def test_loader_goes_on_when_iterated_again(tmp_path):
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


def test_resuming_on_other_ranks_and_workers_finishes_the_pass_exactly(tmp_path):
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
    assert Loader(stream, state=[resumed.state_dict()]).state_dict()["past"] is None  # the old pass is over


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


# ---------------------------------------------------------------------------------------- where images are


def test_imagenet_reads_train_tars_directly_in_the_folder(tmp_path):
    write_tars(tmp_path, [2, 3])
    write_tar(tmp_path / "set-validation-000.tar", {"a.png": png(900)})
    write_tar(tmp_path / "below" / "set-train-009.tar", {"a.png": png(901)})
    assert [shard.name for shard in find_shards("imagenet", str(tmp_path), 4)] == [
        "set-train-000.tar",
        "set-train-001.tar",
    ]


def test_folder_reads_all_image_files_mixed_over_its_shards(tmp_path):
    for label in "abc":
        (tmp_path / label).mkdir()
        for i in range(200):
            (tmp_path / label / f"{i}.JPG").touch()
        (tmp_path / label / "notes.txt").touch()
    shards = find_shards("folder", str(tmp_path), 4)
    chunks = []
    for shard in shards:
        with shard.open(0) as source:
            chunks.append([entry.key for entry in source.entries])
    assert sorted(chain(*chunks)) == sorted(f"{label}/{i}.JPG" for label in "abc" for i in range(200))
    assert {len(chunk) for chunk in chunks} == {256, 88}
    assert all({key[0] for key in chunk} == set("abc") for chunk in chunks)


def test_scenes_are_new_in_every_pass():
    shard = find_shards("scenes", None, 16)[3]
    with shard.open(0) as first, shard.open(1) as second:
        assert not {entry.key for entry in first.entries} & {entry.key for entry in second.entries}
        assert first.read(first.entries[0]).shape == (16, 16, 3)


def test_pipes_and_braces_are_read_like_files(tmp_path):
    write_tars(tmp_path, [5, 6, 7])
    tars = f"{tmp_path}/set-train-00{{0..2}}.tar"
    for location in (tars, f"pipe:cat {tars}"):
        loader = Loader(open_stream("webdataset", location, size=4, batch_size=18))
        assert sorted(take(loader, 1)[0]) == list(range(18))


def test_failing_pipe_is_a_damaged_shard(tmp_path):
    write_tars(tmp_path, [5])
    loader = Loader(
        open_stream("webdataset", f"pipe:false::{tmp_path}/set-train-000.tar", size=4, batch_size=5)
    )
    assert take(loader, 2) == take(Loader(loader.stream), 2)
    assert loader.counts["bad_shard"] == 2
    assert "pipe:false" in loader.errors[0]


@pytest.mark.parametrize(
    ("kind", "sought"), [("imagenet", r"\*train\*\.tar"), ("webdataset", r"\*\.tar"), ("folder", r"\.jpeg")]
)
def test_empty_set_is_an_error_that_says_what_was_sought(tmp_path, kind, sought):
    with pytest.raises(FileNotFoundError, match=sought) as error:
        open_stream(kind, str(tmp_path), size=4, batch_size=1)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_stream(kind, str(tmp_path / "nowhere"), size=4, batch_size=1)


def test_unknown_dataset_type_lists_the_choices():
    with pytest.raises(ValueError, match="imagenet, webdataset, folder, scenes"):
        open_stream("tars", ".", size=4, batch_size=1)


def test_hostile_member_names_reach_nothing_outside(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(666))
    path = tmp_path / "set" / "x-train-0.tar"
    write_tar(path, {str(secret): png(1), "../secret.png": png(2), "../../etc/\x1b[31m.png": png(3)})
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
        fifo = tarfile.TarInfo("pipe.png")
        fifo.type = tarfile.FIFOTYPE
        tar.addfile(fifo)
    loader = Loader(stream_of(path.parent, 3))
    assert [sorted(batch) for batch in take(loader, 2)] == [[1, 2, 3]] * 2
    assert loader.counts == {"seen": 6, "kept": 6}


# ------------------------------------------------------------------------------------------------ curation


def test_thresholds_and_missing_statistics_drop_and_count(tmp_path):
    records = [good() for _ in range(100)]
    records[0:10] = [good(histogram_score=4.5)] * 10
    records[10:14] = [good(width=319)] * 4
    records[14:17] = [good(height=10)] * 3
    records[17:19] = [None, {"mae_loss": "high"}]
    records[50:100] = [good(histogram_score=4.51, width=320)] * 50
    tars, stats = write_web(tmp_path, records, per_tar=25)
    (tmp_path / "stats" / "part1" / "0003.json").unlink()  # images 75-99
    stream = open_stream(
        "webdataset", tars, size=4, batch_size=56, json_path=stats, hist_thresh=4.5, imgres_thresh=320
    )
    loader = Loader(stream)
    for _ in islice(loader, 10):
        pass
    # after the last image kept in pass 10, some of those dropped in it are still to be met
    assert loader.counts["kept"] == 560
    assert loader.counts["shard_without_statistics"] == 10
    for reason, dropped in {"histogram": 10, "resolution": 7, "no_statistics": 2}.items():
        assert 9 * dropped <= loader.counts[reason] <= 10 * dropped
    reasons = ("kept", "histogram", "resolution", "no_statistics")
    assert loader.counts["seen"] == sum(loader.counts[reason] for reason in reasons)


def test_thresholds_keep_exactly_what_passes_them(tmp_path):
    records = [good(histogram_score=4.5 + 0.01 * (i % 2), width=319 + i // 2 % 2) for i in range(20)]
    tars, stats = write_web(tmp_path, [*records, None, {"mae_loss": "high"}])
    stream = open_stream(
        "webdataset", tars, size=4, batch_size=5, json_path=stats, hist_thresh=4.5, imgres_thresh=320
    )
    assert sorted(take(Loader(stream), 1)[0]) == [3, 7, 11, 15, 19]


def test_statistics_may_be_named_after_the_whole_tar(tmp_path):
    tars, stats = write_web(tmp_path, [good()] * 10)
    path = Path(stats) / "part0" / "0000.json"
    path.rename(path.with_name("0000.tar.json"))
    loader = Loader(open_stream("webdataset", tars, size=4, batch_size=10, json_path=stats))
    assert sorted(take(loader, 1)[0]) == list(range(10))


def test_acceptance_is_drawn_anew_at_each_visit_with_the_loss_as_probability(tmp_path):
    losses = {0: 0.1, 1: 0.45, 2: 0.8, 3: 1.0, 4: 7.0, 5: 0.0}
    curation = Curation(str(tmp_path), soft_sampling=True)
    passes = 4000
    for key, loss in losses.items():
        accepted = [
            curation.rejects(good(mae_loss=loss), 0, number, "tar", str(key)) is None
            for number in range(passes)
        ]
        share, expected = np.mean(accepted), min(loss, 1.0)
        assert abs(share - expected) <= 3 * math.sqrt(expected * (1 - expected) / passes)
        if 0 < loss < 1:  # visits are independent of each other
            pairs = np.mean(np.logical_and(accepted[1:], accepted[:-1]))
            assert pairs == pytest.approx(expected**2, abs=0.03)


def test_stream_keeps_images_in_proportion_to_their_loss(tmp_path):
    tars, stats = write_web(tmp_path, [good(mae_loss=0.2)] * 100 + [good(mae_loss=1.3)] * 100)
    loader = Loader(
        open_stream("webdataset", tars, size=4, batch_size=100, json_path=stats, soft_sampling=True)
    )
    taken = np.array(take(loader, 20)).ravel()
    assert np.mean(taken < 100) == pytest.approx(0.2 / 1.2, abs=3 * math.sqrt(0.14 / len(taken)) + 0.01)


def test_bytes_of_rejected_images_are_never_read(tmp_path, monkeypatch):
    tars, stats = write_web(tmp_path, [good(histogram_score=1.0 + 5 * (i % 4 == 0)) for i in range(40)])
    stream = open_stream("webdataset", tars, size=4, batch_size=10, json_path=stats, hist_thresh=4.5)
    read = []
    monkeypatch.setattr("pixio.data.shards._read_at", lambda *place: read.append(place) or png(7))
    take(Loader(stream), 1)
    assert len(read) == 10


@pytest.mark.parametrize("text", ["[1, 2]", "{", "[" * 100_000])
def test_damaged_statistics_are_a_damaged_shard(tmp_path, text):
    tars, stats = write_web(tmp_path, [good()] * 100)
    (Path(stats) / "part0" / "0000.json").write_text(text)
    loader = Loader(open_stream("webdataset", tars, size=4, batch_size=50, json_path=stats))
    for batch in take(loader, 2):
        assert sorted(batch) == list(range(50, 100))
    assert loader.counts["bad_shard"] == 2
    assert "part0/0000.tar" in loader.errors[0]


def test_thresholds_without_statistics_are_refused(tmp_path):
    with pytest.raises(ValueError, match="json_path"):
        open_stream("webdataset", str(tmp_path), size=4, batch_size=1, soft_sampling=True)
    with pytest.raises(ValueError, match="webdataset only"):
        open_stream("imagenet", str(tmp_path), size=4, batch_size=1, json_path=str(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_wholly_filtered_set_is_an_error_with_counts(tmp_path, workers):
    tars, stats = write_web(tmp_path, [good(width=10)] * 60, per_tar=20)
    stream = open_stream("webdataset", tars, size=4, batch_size=1, json_path=stats, imgres_thresh=320)
    with pytest.raises(DataError, match=r"gives no image(.|\n)*resolution \d+, seen \d+"):
        take(Loader(stream, num_workers=workers), 1)


def test_set_that_chance_never_keeps_is_an_error(tmp_path):
    tars, stats = write_web(tmp_path, [good(mae_loss=0.0)] * 3)
    stream = open_stream("webdataset", tars, size=4, batch_size=1, json_path=stats, soft_sampling=True)
    with pytest.raises(DataError, match="sampled_out"):
        take(Loader(stream), 1)


def test_rarely_kept_image_is_waited_for(tmp_path):
    tars, stats = write_web(tmp_path, [good(mae_loss=0.1)])
    stream = open_stream("webdataset", tars, size=4, batch_size=5, json_path=stats, soft_sampling=True)
    assert take(Loader(stream), 1) == [[0] * 5]


def test_unlucky_consumer_waits_for_its_turn(tmp_path):
    records = [good(width=10)] * 30 + [good()] + [good(width=10)] * 29
    tars, stats = write_web(tmp_path, records, per_tar=10)
    stream = open_stream("webdataset", tars, size=4, batch_size=3, json_path=stats, imgres_thresh=320)
    for rank in range(3):
        assert take(Loader(stream, rank=rank, world_size=3), 2) == [[30] * 3] * 2


def test_single_usable_image_is_enough_for_one_consumer(tmp_path):
    tars, stats = write_web(tmp_path, [good(width=10)] * 25 + [good()])
    stream = open_stream("webdataset", tars, size=4, batch_size=3, json_path=stats, imgres_thresh=320)
    assert take(Loader(stream), 3) == [[25] * 3] * 3


# -------------------------------------------------------------------------------------------------- damage


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        with tarfile.open(path) as tar:
            path.write_bytes(data[: tar.getmembers()[-1].offset_data + 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "not a tar":
        path.write_bytes(b"<html>404</html>" * 200)
    elif how == "broken header":
        with tarfile.open(path) as tar:
            offset = tar.getmembers()[3].offset
        path.write_bytes(data[:offset] + b"\xa5" * 512 + data[offset + 512 :])
    elif how == "no image":
        write_tar(path, {"a.txt": b"hello"})
    elif how == "negative size":
        size = (-1024).to_bytes(12, "big", signed=True)
        header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
        header[124:136] = size
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
        path.write_bytes(bytes(header) + data)
    elif how == "huge size":
        info = tarfile.TarInfo("a.png")
        info.size = 1 << 50
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    elif how == "huge name":
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 50
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + data)


DAMAGES = [
    "truncated",
    "empty",
    "not a tar",
    "broken header",
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
    assert loader.counts["bad_shard"] == 2  # once in each pass
    assert "set-train-001.tar" in loader.errors[0]


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
        damage(path, "truncated")
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
    assert max(Counter(passes).values()) <= 5  # a reader may be one pass ahead
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


def test_no_process_is_left_when_the_reader_stops(tmp_path):
    write_tars(tmp_path, [12, 12])
    before = set(multiprocessing.active_children())
    batches = iter(Loader(stream_of(tmp_path), num_workers=2))
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) == before


def test_no_process_is_left_when_the_reader_is_killed(tmp_path):
    write_tars(tmp_path, [12, 12])
    code = f"""
import multiprocessing, time
from pixio.data import Loader, open_stream
batches = iter(Loader(open_stream("imagenet", {str(tmp_path)!r}, size=4, batch_size=4), num_workers=2))
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


# ---------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (1200, 100), (64, 900)])
def test_crop_boxes_are_distributed_as_torchvisions(width, height):
    draws, rng = 3000, np.random.default_rng(0)
    ours = np.array([crop_box(rng, width, height, (0.2, 1.0)) for _ in range(draws)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(draws)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in theirs])
    for mine, other in zip(ours.T, theirs.T, strict=True):
        grid = np.union1d(mine, other)
        cdfs = [np.searchsorted(np.sort(values), grid, "right") / draws for values in (mine, other)]
        assert np.abs(cdfs[0] - cdfs[1]).max() < 1.95 * math.sqrt(2 / draws)  # Kolmogorov-Smirnov, p = 0.001


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9))
def test_crop_boxes_lie_inside_the_image(width, height, seed):
    left, top, w, h = crop_box(np.random.default_rng(seed), width, height, (0.2, 1.0))
    assert 0 <= left < left + w <= width
    assert 0 <= top < top + h <= height


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def test_crop_equals_torchvisions_for_the_same_box():
    image = noise(90, 70)
    for seed in range(10):
        left, top, width, height = crop_box(np.random.default_rng(seed), 90, 70, (0.2, 1.0))
        expected = tvf.resized_crop(image, top, left, height, width, [32, 32], InterpolationMode.BICUBIC)
        ours = random_resized_crop(image, np.random.default_rng(seed), 32, (0.2, 1.0))
        assert torch.equal(ours, tvf.pil_to_tensor(expected))


@pytest.mark.parametrize(("width", "height"), [(90, 70), (61, 127), (40, 40)])
def test_central_crop_equals_torchvisions(width, height):
    image = noise(width, height)
    expected = tvf.center_crop(tvf.resize(image, 48, InterpolationMode.BICUBIC), [40, 40])
    assert torch.equal(resize_center_crop(image, 48, 40), tvf.pil_to_tensor(expected))


def test_central_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match=r"64 px.*48 px"):
        resize_center_crop(noise(90, 70), 48, 64)


def test_central_crop_of_a_strip_too_thin_to_be_resized_is_refused():
    with pytest.raises(DamagedDataError, match="256 x 5120000 is above"):
        resize_center_crop(Image.new("RGB", (1, 20_000)), 256, 256)


def test_normalize_matches_torchvision_and_is_undone():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = tvf.normalize(images.float() / 255, normalization.IMAGENET_MEAN, normalization.IMAGENET_STD)
    torch.testing.assert_close(normalize(images), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(denormalize(normalize(images)), images)
    with pytest.raises(ValueError, match=r"float32"):
        normalize(images.float())


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_every_colour_mode_becomes_rgb():
    grey = Image.fromarray(np.full((4, 4), 100, np.uint8))
    deep = Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).quantize()
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    cases = [
        (encoded(grey, "png"), (100, 100, 100)),
        (encoded(grey, "jpeg"), (100, 100, 100)),
        (encoded(grey.point(lambda v: 255, "1"), "png"), (255, 255, 255)),
        (encoded(deep, "png"), (100, 100, 100)),
        (encoded(palette, "png"), (10, 200, 30)),
        (encoded(palette, "png", transparency=0), (255, 255, 255)),
        (encoded(clear, "png"), (255, 255, 255)),
        (encoded(clear, "webp", lossless=True), (255, 255, 255)),
        (encoded(half, "png"), (127, 127, 127)),
        (encoded(cmyk, "jpeg"), (255, 0, 0)),
    ]
    for data, colour in cases:
        image = decode(data)
        assert image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image)[1, 1], colour, atol=3)


def photographs() -> dict[str, Image.Image]:
    data = pytest.importorskip("skimage.data")
    names = ("astronaut", "camera", "chelsea", "coffee", "rocket")
    return {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in names}


def both_ways(data: bytes, size: int, seed: int) -> list[torch.Tensor]:
    """A random crop as decoded by default and by reference."""
    ways = []
    for exact in (False, True):
        choose = partial(crop_box, np.random.default_rng(seed), scale=(0.2, 1.0))
        ways.append(decode_crop(data, size, choose, exact).int())
    return ways


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("options", [{"quality": 75}, {"quality": 95}, {"quality": 85, "progressive": True}])
def test_fast_crops_of_photographs_are_within_two_levels_of_exact_ones(size, options):
    for name, image in photographs().items():
        data = encoded(image, "jpeg", **options)
        for seed in range(4):
            fast, exact = both_ways(data, size, seed)
            assert (fast - exact).abs().float().mean() <= 2, (name, seed)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_fast_crops_of_other_formats_are_resized_alike(format):
    data = encoded(photographs()["coffee"], format)
    for size in (16, 64, 256):
        fast, exact = both_ways(data, size, seed=0)
        assert (fast - exact).abs().float().mean() < 0.5


def test_exact_crop_equals_torchvisions_of_the_whole_image():
    data = encoded(noise(90, 70), "jpeg", quality=95)
    left, top, width, height = crop_box(np.random.default_rng(5), 90, 70, (0.2, 1.0))
    whole = Image.open(io.BytesIO(data))
    expected = tvf.resized_crop(whole, top, left, height, width, [32, 32], InterpolationMode.BICUBIC)
    assert torch.equal(both_ways(data, 32, seed=5)[1], tvf.pil_to_tensor(expected).int())


@pytest.mark.parametrize("backend", ["simplejpeg", "Pillow"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 1}, {"restart_marker_rows": 1}]
)
def test_rows_above_the_bottom_are_those_of_the_whole_image(monkeypatch, backend, options):
    if backend == "Pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    grey = noise(20, 15).convert("L").convert("RGB").resize((301, 227))  # no chroma to interpolate
    data = encoded(grey, "jpeg", quality=85, **options)
    frame = jpeg.read_frame(data)
    assert (frame.width, frame.height, frame.baseline) == (301, 227, "progressive" not in options)
    whole = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    rows = jpeg.decode_rows(data, frame, 101, 1)
    height = -(-101 // frame.unit) * frame.unit if frame.baseline else 227
    assert frame.unit == (8 if "subsampling" in options else 16)
    assert rows.shape == (height, 301, 3)
    np.testing.assert_allclose(rows[:101], whole[:101], atol=1)
    assert jpeg.decode_rows(data, frame, 101, 4).shape == (-(-height // 4), 76, 3)


def test_without_simplejpeg_pillow_steps_in_with_a_note(tmp_path, monkeypatch):
    write_tars(tmp_path, [2])
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    with pytest.warns(UserWarning, match="pip install simplejpeg"):
        stream_of(tmp_path)
    fast, exact = both_ways(encoded(photographs()["rocket"], "jpeg"), 64, seed=1)
    assert (fast - exact).abs().float().mean() <= 2


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


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_images_are_turned_upright(format):
    upright = Image.new("RGB", (32, 16), "red")
    upright.paste("blue", (16, 0, 32, 16))
    turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    for tag, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        data = encoded(upright.transpose(turn), format, exif=exif)
        assert decoding.read_size(data) == (32, 16)
        pixels = np.asarray(decode(data))
        np.testing.assert_allclose(pixels[8, [4, 28]], [(255, 0, 0), (0, 0, 255)], atol=8)
        crop = decode_crop(data, 8, lambda width, height: (0, 0, width // 2, height))
        assert crop[0].min() > 200 > 60 > crop[2].max()


def test_unreadable_metadata_costs_no_image():
    data = encoded(Image.new("RGB", (32, 16), "red"), "jpeg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data).size == (32, 16)
    assert decode_crop(data, 8, lambda width, height: (0, 0, width, height)).shape == (3, 8, 8)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_animations_give_their_first_frame(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[3, 3].tolist() == pytest.approx([255, 0, 0], abs=8)


def test_jpeg_cut_off_below_the_crop_is_damaged():
    whole = encoded(photographs()["coffee"], "jpeg")
    for end in (len(whole) // 2, len(whole) - 2):
        with pytest.raises(DamagedDataError):
            decode_crop(whole[:end], 32, lambda width, height: (0, 0, 64, 64))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=40))
def test_no_bytes_make_decoding_fail_otherwise(at, patch):
    data = bytearray(encoded(noise(40, 30), "jpeg"))
    at %= len(data)
    data[at : at + len(patch)] = patch
    try:
        crop = decode_crop(bytes(data), 8, lambda width, height: (0, 0, width, height))
    except DamagedDataError:
        return
    assert crop.shape == (3, 8, 8)


def test_damaged_bytes_raise_one_error():
    whole = encoded(noise(64, 64), "jpeg")
    for data in (b"", b"GIF89a", whole[: len(whole) // 2], png(3)[:50], encoded(noise(8, 8), "bmp")):
        with pytest.raises(DamagedDataError):
            decode(data)


def test_too_many_pixels_are_refused_from_the_header(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 99)
    monkeypatch.setattr(decoding, "to_rgb", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr(jpeg, "decode_rows", lambda *args: pytest.fail("decoded"))
    data = encoded(noise(10, 10), "jpeg")
    for read in (decode, decoding.read_size, lambda data: decode_crop(data, 4, lambda w, h: (0, 0, w, h))):
        with pytest.raises(DamagedDataError, match=r"10 x 10 is above 99 pixels"):
            read(data)
