"""The one rule by which folders and tars are listed: junk is no data, links are followed once."""

import errno
import os
from pathlib import Path

import pytest

from pixio.images.listing import is_junk, list_files


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


JUNK = [
    "._a.jpg",
    "x/._a.jpg",
    ".cache/a.jpg",
    ".ipynb_checkpoints/a.jpg",
    ".Trash-1000/files/a.jpg",
    "__MACOSX/x/a.jpg",
    "./__MACOSX/a.jpg",
    "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
    "$RECYCLE.BIN/a.jpg",
]


@pytest.mark.parametrize("path", JUNK)
def test_hidden_files_and_system_folders_are_junk(path):
    assert is_junk(path)


@pytest.mark.parametrize("path", ["a.jpg", "./a.jpg", "../x/a.jpg", "/data/a.b.jpg", "_a.jpg", "eaDir/a.jpg"])
def test_other_paths_are_data(path):
    assert not is_junk(path)


def test_images_in_and_below_a_folder_are_listed_sorted(tmp_path):
    names = ["a/._1.jpg", "a/1.jpg", "a/n.txt", "b/2.PNG", "b/@eaDir/2.PNG/t.jpg", "3.webp", ".h/4.jpg"]
    assert list_files(touch(tmp_path, *names)) == ["3.webp", "a/1.jpg", "b/2.PNG"]
    assert list_files(tmp_path, (".txt",)) == ["a/n.txt"]


def test_folder_that_is_itself_hidden_can_be_listed(tmp_path):
    assert list_files(touch(tmp_path, ".cache/data/a.jpg") / ".cache/data") == ["a.jpg"]


def test_loops_of_links_list_each_file_once(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    for folder in "ab":
        (tmp_path / folder / "loop").symlink_to("..")
    (tmp_path / "a" / "self").symlink_to("self")
    assert list_files(tmp_path) == ["a/1.jpg", "b/2.jpg"]


def test_linked_folders_are_listed_once_under_their_own_path_if_they_have_one(tmp_path):
    touch(tmp_path, "root/b/1.jpg", "elsewhere/2.jpg")
    for name, target in {"a": "b", "y": "../elsewhere", "x": "../elsewhere"}.items():
        (tmp_path / "root" / name).symlink_to(target)
    assert list_files(tmp_path / "root") == ["b/1.jpg", "x/2.jpg"]


def test_linked_files_count_and_what_is_no_file_does_not(tmp_path):
    touch(tmp_path, "1.jpg", "folder.jpg/2.png")
    (tmp_path / "linked.jpg").symlink_to("1.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere")  # listed, so that reading it tells
    os.mkfifo(tmp_path / "pipe.jpg")
    assert list_files(tmp_path) == ["1.jpg", "broken.jpg", "folder.jpg/2.png", "linked.jpg"]


def test_folder_that_cannot_be_listed_is_left_out_with_a_warning(tmp_path, monkeypatch):
    touch(tmp_path, "open/0.png", "closed/0.png")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(UserWarning, match="closed cannot be listed and is left out: Permission denied"):
        assert list_files(tmp_path) == ["open/0.png"]


def test_names_that_are_not_utf8_are_listed(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    (tmp_path / os.fsdecode(b"caf\xe9/\xff.jpg")).touch()
    assert [os.fsencode(name) for name in list_files(tmp_path)] == [b"caf\xe9/\xff.jpg"]
