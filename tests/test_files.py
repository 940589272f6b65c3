"""Files that are whole or absent, and what a full disk is told as."""

import errno
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import largest_file
from PIL import Image
from safetensors.torch import save_file

from pixio.files import (
    disk_full,
    read_json,
    remove_leftovers,
    require_free,
    temporary_path,
    write_atomic,
    write_json,
)

TENSOR, PIXELS = torch.ones(2**15), np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
WRITERS = {
    "bytes": lambda file: file.write(bytes(2**17)),
    "lines": lambda file: file.writelines(b"x" * 99 + b"\n" for _ in range(2000)),
    "torch": lambda file: torch.save({"a": TENSOR}, file),
    "npy": lambda file: np.save(file, TENSOR.numpy()),
    "npz": lambda file: np.savez(file, a=TENSOR.numpy(), b=TENSOR.numpy()),
    "png": lambda file: Image.fromarray(PIXELS).save(file, "png"),
    "gif": lambda file: Image.fromarray(PIXELS).save(file, "gif"),
}


@pytest.fixture
def small_disk():
    """No file may grow beyond 64 kB; the system refuses what is more as it does on a full disk."""
    with largest_file(2**16):
        yield


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_names_file_and_the_bytes_it_needs(tmp_path, small_disk, kind, monkeypatch):
    whole = io.BytesIO()
    WRITERS[kind](whole)
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"old")
    with pytest.raises(OSError, match="cannot write") as caught:
        write_atomic("file", WRITERS[kind])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"cannot write {tmp_path / 'file'}: File too large")
    assert f"({len(whole.getvalue()):,} bytes needed, " in line
    assert re.search(r"[\d,]+ bytes free\)$", line)
    assert caught.value.errno == errno.EFBIG
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_full_disk_leaves_nothing_of_a_file_that_a_library_writes(tmp_path, small_disk):
    expected = r"cannot write .*weights: .*more needed than the [\d,]+ bytes free"
    with pytest.raises(OSError, match=expected), temporary_path(tmp_path / "weights") as path:
        save_file({"a": TENSOR}, path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_disk_has_no_room_for_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    require_free(tmp_path / "file", 1000)
    expected = r"No space left on device \(1,001 bytes needed, 1,000 bytes free\)"
    with pytest.raises(OSError, match=expected):
        require_free(tmp_path / "file", 1001)
    with pytest.raises(OSError, match=expected), temporary_path(tmp_path / "file", 1001):
        pytest.fail("nothing may be written")


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    assert disk_full(PermissionError(errno.EACCES, "no"), tmp_path) is None
    with pytest.raises(FileNotFoundError), temporary_path(tmp_path / "file") as path:
        (path / "absent").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_begun_is_named_as_the_caller_named_it(tmp_path, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    path = tmp_path / "absent/results.json"
    with pytest.raises(FileNotFoundError) as stopped:
        write_atomic(path, lambda file: file.write(b""))
    assert stopped.value.filename == str(path)
    assert not unraisable  # of a half-made file object, whose end Python 3.13 reports


def test_write_atomic_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "results.json"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise KeyError("writer")

    with pytest.raises(KeyError):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_can_be_written_out_of_order(tmp_path):
    def write(file):
        file.write(bytes(8))
        file.seek(2)
        file.write(b"ab")
        assert file.tell() == 4
        file.seek(0, os.SEEK_END)
        file.write(b"c")

    write_atomic(tmp_path / "file", write)
    assert (tmp_path / "file").read_bytes() == b"\0\0ab\0\0\0\0c"


def test_a_file_and_what_lies_beside_it_replace_the_old_ones(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"old")
    with temporary_path(tmp_path / "model.onnx") as path:
        path.write_bytes(b"graph")
        path.with_name("model.onnx.data").write_bytes(b"weights")
        assert (tmp_path / "model.onnx").read_bytes() == b"old"
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"model.onnx": b"graph", "model.onnx.data": b"weights"}


def test_json_is_readable_by_people_and_ends_in_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1, None]}
    assert text.startswith("{\n  ")
    assert text.endswith("}\n")


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    content = {"iou": [1.5, math.nan, np.float64("nan")], "best": {"rmse": math.inf}, "n": (1, True, "nan")}
    write_json(tmp_path / "a.json", content)
    found = read_json(tmp_path / "a.json")
    assert found == {"iou": [1.5, None, None], "best": {"rmse": None}, "n": [1, True, "nan"]}


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    for name in (".a.json.123.tmp", ".b.json.123.tmp", "a.json", ".hidden"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.123.tmp", ".hidden", "a.json"]
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.json"]
