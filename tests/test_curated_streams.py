"""Streams of curated images: what the statistics keep and drop, and what is counted."""

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from image_sets import (
    good,
    png,
    take,
    write_web,
)

from pixio.data import Curation, DataError, Loader, open_stream


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
    # after the last image kept in epoch 10, some of those dropped in it are still to come
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
    monkeypatch.setattr("pixio.data.shards.read_member", lambda *place: read.append(place) or png(7))
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
