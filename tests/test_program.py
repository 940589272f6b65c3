"""Output that cannot be written ends no program; a mistake ends it with one line."""

import importlib
import os
import re
import subprocess
import sys
import warnings

import pytest

from pixio.cli import main as cli
from pixio.engine.program import program

BODY = """
import sys
from pathlib import Path
from pixio.engine.program import program

with program("prog", "train"):
    for i in range(20000):
        print(f"line {i}", flush=i % 100 == 0)
        print(f"note {i}", file=sys.stderr)
    Path("done").touch()
"""


@pytest.mark.parametrize("redirect", ["| head -n 1", "2>&1 | head -n 1", "2>&1 >/dev/null | :", "| :"])
def test_a_reader_that_goes_away_stops_nobody(redirect, tmp_path):
    command = f"set -o pipefail; {sys.executable} - {redirect}"
    done = subprocess.run(["bash", "-c", command], input=BODY, cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "done").exists()
    assert done.returncode == 0
    assert "Error" not in done.stderr


def test_a_full_disk_behind_stdout_stops_nobody(tmp_path):
    command = f"{sys.executable} - >/dev/full"
    subprocess.run(["bash", "-c", command], input=BODY, cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "done").exists()


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from pixio.engine.program import program
from pixio.engine.signals import defer_signals, received

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
with program("prog", "train"), defer_signals():
    os.kill(os.getpid(), signal.SIGINT)
    assert received(signal.SIGINT)
    Path(sys.argv[1]).touch()
"""


def test_ctrl_c_that_also_ends_the_reader_of_stderr_still_lets_a_run_save(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)  # as by Ctrl-C on `main_pretrain.py 2>&1 | tee`
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "saved")]
    done = subprocess.run(command, stderr=writer, check=False)
    os.close(writer)
    assert (tmp_path / "saved").exists()
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_a_terminal_cannot_show_is_escaped(encoding, tmp_path):
    code = (
        "from pixio.engine.program import program\nwith program('prog', 'cli'): print('\\u2026', '\\udcff')"
    )
    env = {"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    shown = "…" if encoding == "utf-8" else "\\u2026"
    assert done.stdout.decode() == f"{shown} \\udcff\n"


def test_a_mistake_is_one_line_and_other_errors_pass():
    with pytest.raises(SystemExit, match=r"^prog: error: no such thing$"), program("prog", "eval"):
        raise ValueError("no such thing")
    with pytest.raises(RuntimeError), program("prog", "eval"):
        raise RuntimeError
    with pytest.raises(SystemExit, match="failed"), program("prog", "eval", (RuntimeError,)):
        raise RuntimeError("failed")


def test_a_file_that_the_system_refuses_is_named_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = f"^prog: error: {re.escape(str(tmp_path))}/no/such.txt: No such file or directory$"
    with pytest.raises(SystemExit, match=expected), program("prog", "eval"):
        open("no/such.txt")  # noqa: SIM115


def test_ctrl_c_before_there_is_anything_to_save_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, program("prog", "eval"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "prog: interrupted\n"


def test_a_warning_is_one_line_in_every_program(monkeypatch):
    before, shown = warnings.formatwarning, []

    def warn(*_):
        shown.append(warnings.formatwarning(UserWarning("few"), UserWarning, "code.py", 1))

    with program("prog", "eval"):
        warn()
    monkeypatch.setattr(cli.Info, "run", warn)
    cli.main(["info"])
    assert shown == ["warning: few\n"] * 2
    assert warnings.formatwarning is before


def test_a_missing_library_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    message = r"submitit is not installed: pip install 'pixio\[train\]' brings it"
    with pytest.raises(SystemExit, match=message), program("prog", "train"):
        importlib.import_module("submitit")
