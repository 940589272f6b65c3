"""Where training images are: folders, tars, URLs, scenes."""

import tarfile
from itertools import chain

import pytest
from image_sets import png, stream_of, take, write_tar, write_tars

from pixio.data import Loader, find_shards, open_stream


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


def test_scenes_are_new_in_every_epoch():
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
