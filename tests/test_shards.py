"""Where training images are: folders, tars, URLs, scenes."""

import json
import os
import subprocess
import tarfile
import tempfile
from itertools import chain
from pathlib import Path

import pytest
from helpers import write_tar
from image_sets import png, stream_of, take, write_tars

from pixio.data import Loader, find_shards, open_stream
from pixio.data.tar_index import index_tar, read_member
from pixio.images.decoding import DamagedDataError
from pixio.images.listing import IMAGE_SUFFIXES


@pytest.mark.parametrize("link", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_beside_the_images_of_a_tar_are_counted_and_said(tmp_path, link):
    write_tar(tmp_path / "set-train-000.tar", {"0.png": png(0), "1.png": png(1)})
    with tarfile.open(tmp_path / "set-train-000.tar", "a") as tar:
        for name in ("2.png", "3.png", "3.txt"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = link, "0.png"
            tar.addfile(member)
    loader = Loader(open_stream("imagenet", str(tmp_path), size=4, batch_size=2))
    assert sorted(take(loader, 1)[0]) == [0, 1]
    assert loader.counts["incomplete_shard"] == 1
    assert "set-train-000.tar: of 4 images 2 are links, which tar --dereference" in loader.errors[0]


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


def test_a_command_that_a_signal_ends_is_run_again(tmp_path):
    """A scheduler warns all processes of a job; the images must be those that an undisturbed job reads."""
    write_tars(tmp_path, [5])
    tar, mark = tmp_path / "set-train-000.tar", tmp_path / "mark"
    command = f"head -c 700 {tar}; [ -e {mark} ] || {{ touch {mark}; kill -USR2 $$; }}; tail -c +701 {tar}"
    loader = Loader(open_stream("webdataset", f"pipe:{command}", size=4, batch_size=5))
    assert sorted(take(loader, 1)[0]) == list(range(5))
    assert mark.exists()
    assert not loader.counts["bad_shard"]


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
    assert loader.counts == {"seen": 6, "kept": 6, "incomplete_shard": 2}  # for their links, in two passes


def members(data: bytes, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> dict[str, bytes]:
    """What an index of a tar finds, read by it; under `damage` what it says of the rest."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        index = index_tar(file, suffixes)
        found = {e.key: read_member(file.fileno(), e, index.extents.get(e.offset)) for e in index.entries}
    return found | ({"damage": index.damage.encode()} if index.damage else {})


def tar(tmp_path: Path, *names: str) -> bytes:
    return write_tar(tmp_path / "x.tar", {name: name.encode() for name in names}).read_bytes()


def test_hidden_members_of_a_tar_are_no_images(tmp_path):
    names = ["._0.jpg", "./0.jpg", "a/._1.jpg", "__MACOSX/a/2.jpg", "@eaDir/3.jpg", "a/4.PNG"]
    assert list(members(tar(tmp_path, *names))) == ["./0.jpg", "a/4.PNG"]


def test_tars_that_follow_one_another_in_a_file_are_read(tmp_path):
    first, second = tar(tmp_path, "0.jpg"), tar(tmp_path, "1.jpg", "2.jpg")
    assert members(first + second) == {name: name.encode() for name in ("0.jpg", "1.jpg", "2.jpg")}
    cut = members(first + second[:1200])
    assert list(cut) == ["0.jpg", "1.jpg", "damage"]
    assert members(first + b"\0" * 71_680 + second) == members(first + second)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (1024, None),
        (1100, "broken header at byte 1,024"),
        (1538, "cut off at byte 1,538, inside of member '1.jpg'"),
    ],
)
def test_tar_that_is_cut_off_gives_its_complete_members_and_says_so(tmp_path, end, said):
    found = members(tar(tmp_path, "0.jpg", "1.jpg")[:end])
    assert found.pop("0.jpg") == b"0.jpg"
    assert found == ({"damage": f"{said}: the 1 images before it are used".encode()} if said else {})
    with pytest.raises(DamagedDataError, match="not a readable tar: cut off at byte 515"):
        members(tar(tmp_path, "0.jpg")[:515])


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tar_under_a_plain_name_is_said_to_be_compressed(tmp_path, mode):
    with tarfile.open(tmp_path / "x.tar", f"w:{mode}") as archive:
        archive.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(DamagedDataError, match=r"compressed with (gzip|bzip2|xz).*unpack it"):
        members((tmp_path / "x.tar").read_bytes())


def test_tar_of_links_or_of_tars_says_what_it_holds(tmp_path):
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        link = tarfile.TarInfo("0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/data/0.jpg"
        archive.addfile(link)
    with pytest.raises(DamagedDataError, match=r"no image member.*1 are links, which tar --dereference"):
        members((tmp_path / "links.tar").read_bytes())
    with pytest.raises(DamagedDataError, match=r"no image member.*2 are tars themselves: unpack them"):
        members(tar(tmp_path, "a.tar", "b.tar.gz"))


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "posix"])
def test_sparse_members_are_read(tmp_path, format):
    with open(tmp_path / "0.jpg", "wb") as file:
        file.write(b"begin")
        file.seek(3 << 20)
        file.write(b"middle")
        file.seek(5 << 20)
        file.write(b"end")
    (tmp_path / "1.jpg").write_bytes(b"plain")
    command = ["tar", "--sparse", f"--format={format}", "-cf", "x.tar", "0.jpg", "1.jpg"]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert (tmp_path / "x.tar").stat().st_size < 1 << 20
    found = members((tmp_path / "x.tar").read_bytes())
    assert found == {name: (tmp_path / name).read_bytes() for name in ("0.jpg", "1.jpg")}


def test_a_folder_says_how_many_images_it_holds_in_all(tmp_path):
    for i in range(300):
        (tmp_path / f"{i}.{'JPG' if i % 3 else 'png'}").touch()
    stream = open_stream("folder", str(tmp_path), size=4, batch_size=4)
    assert stream.describe() == "training set: 300 images (200 .jpg, 100 .png)"


def test_suffix_chooses_images_among_their_companions_and_the_count_says_so(tmp_path):
    write_tar(tmp_path / "x.tar", {f"{i}{end}": png(i) for i in range(3) for end in (".png", ".seg.png")})
    every = open_stream("webdataset", str(tmp_path), size=4, batch_size=4)
    assert every.describe() == "training set: 1 tar; the first holds 6 images (3 .png, 3 .seg.png)"
    chosen = open_stream("webdataset", str(tmp_path), size=4, batch_size=4, image_suffix=".SEG.png")
    assert chosen.describe() == "training set: 1 tar; the first holds 3 images (3 .seg.png)"


@pytest.mark.parametrize(
    ("kind", "name", "remedy"),
    [
        ("imagenet", "a/0.jpg", "holds 1 images: use --dataset_type folder"),
        ("webdataset", "a/0.jpg", "holds 1 images: use --dataset_type folder"),
        ("folder", "a/0.tar", "holds 1 tars: use --dataset_type webdataset"),
        ("imagenet", "a/0.tar", "holds 1 tars: use --dataset_type webdataset"),
        ("webdataset", "0.tar.gz", "compressed tars.*gunzip"),
        ("webdataset", "data/0.parquet", "parquet files.*load_dataset"),
    ],
)
def test_set_of_another_kind_is_named_with_the_way_to_read_it(tmp_path, kind, name, remedy):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name):
        if path.is_file() and path.suffix in (".tar", ".jpg"):
            continue
        with pytest.raises(FileNotFoundError, match=remedy):
            open_stream(kind, str(path), size=4, batch_size=1)


def test_names_that_are_not_utf8_are_read_counted_and_saved(tmp_path):
    root = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    root.mkdir()
    for i in range(4):
        (root / os.fsdecode(b"%d\xff.png" % i)).write_bytes(png(i) if i else b"?")
    write_tar(root / os.fsdecode(b"\xe9.tar"), {os.fsdecode(b"%d\xff.png" % i): png(i) for i in range(4)})
    for kind, count in (("folder", 3), ("webdataset", 4)):
        loader = Loader(open_stream(kind, str(root), size=4, batch_size=count))
        assert len(take(loader, 1)[0]) == count
        assert json.loads(json.dumps(loader.report(), ensure_ascii=False)) == loader.report()
        again = Loader(loader.stream, state=json.loads(json.dumps([loader.state_dict()])))
        assert take(again, 1) == take(loader, 1)
