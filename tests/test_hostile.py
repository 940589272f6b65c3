"""Short campaigns of benchmarks/faults.py: files that may be anybody's, attacks first; kills; load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest
import torch
from hostile import READERS, Reader

import pixio
from pixio.data.curation import has_scores, write_statistics

INPUTS = {True: 15, False: 60}  # of slow readers and others, besides the attacks


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_and_attacks_give_a_result_or_the_documented_error(tmp_path, name):
    reader, findings = READERS[name], tmp_path / "findings"
    faults.watch_over(reader, name, 0, len(reader.seeds()) + INPUTS[reader.slow], findings)
    assert not findings.exists() or findings.read_text() == ""


def test_what_no_reader_may_do_is_seen(tmp_path):
    watch = faults.Watch(tmp_path)
    for act in (lambda _: (tmp_path.parent / "outside").write_text(""), lambda _: os.system("true")):
        reader = Reader(act, list)
        assert "written outside" in faults.attempt(reader, {}, tmp_path, watch)
    inside = Reader(lambda folder: (folder / "x").write_text(""), list)
    assert faults.attempt(inside, {}, tmp_path, watch) is None


def test_tied_weights_load_and_endless_views_do_not(tmp_path):
    model = pixio.pixio_vitti16(img_size=32, embed_dim=8, depth=1, num_heads=2)
    state = model.state_dict()
    state["norm.bias"] = state["blocks.0.norm1.bias"] = state["blocks.0.norm2.bias"]
    torch.save(state, tmp_path / "tied.pth")
    pixio.from_pretrained(tmp_path / "tied.pth", 2)
    torch.save(state | {"pos_embed": torch.zeros(1).expand(1, 1 << 40, 8)}, tmp_path / "endless.pth")
    with pytest.raises(ValueError, match="its tensors would take"):
        pixio.from_pretrained(tmp_path / "endless.pth", 2)


def test_statistics_that_are_no_numbers_are_computed_anew(tmp_path):
    old = {"a.jpg": {"width": float("nan"), "height": 3, "mae_loss": [1]}}
    (tmp_path / "x.json").write_text(json.dumps(old))
    write_statistics(tmp_path / "x.json", {"a.jpg": {"histogram_score": 5.0}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a.jpg": {"height": 3, "histogram_score": 5.0}}
    assert not has_scores(old["a.jpg"], ("width",))


def test_memory_that_was_refused_is_seen_behind_a_documented_error(tmp_path):
    def read(_):
        try:
            raise MemoryError
        except MemoryError:
            raise ValueError("damaged") from None

    assert "too much memory" in faults.attempt(Reader(read, list), {}, tmp_path, faults.Watch(tmp_path))


def campaign(output: Path, *flags: str) -> None:
    """Run a part of the campaign, which fails where something is found."""
    command = [sys.executable, faults.__file__, *flags, "--output", output]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.slow
def test_killed_runs_lose_nothing_and_leave_nothing(tmp_path):
    campaign(tmp_path, "kills", "--kills", "2", "--only", "SIGKILL to one rank", "SIGUSR2", "disk full")
    rows = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["what"]) for row in rows] == [(["pretraining", 2, "ddp"], [])] * 2


@pytest.mark.slow
def test_thousands_of_files_are_all_read_and_features_survive_a_kill(tmp_path):
    campaign(tmp_path, "load", "--scale", "0.004", "--untimed")
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert rows["killed"]["findings"] == []
    assert rows["names listed"]["sizes"] == [1000, 2000, 4000]
