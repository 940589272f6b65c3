"""README and documentation: short enough, every link leads somewhere, every command is one that exists.

`make docs-check` runs the commands; here their programs, flags and model names are looked up.
"""

import ast
import re
import shlex
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from docs_check import NOT_RUN, TREES, Snippet, snippets_of
from docs_check import PAGES as RUN

import pixio
from pixio.cli.main import COMMANDS
from pixio.models import builders

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = 1300
_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def anchors_of(page: Path) -> set[str]:
    """The names under which the headings of a page can be linked."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_a_front_page():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    for link in (a or b for a, b in _LINK.findall(page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_every_page_is_linked_from_the_readme_or_from_another_page():
    linked = {
        (page.parent / (a or b).partition("#")[0]).resolve()
        for page in PAGES
        for a, b in _LINK.findall(page.read_text())
    }
    assert {page for page in PAGES if page.name != "README.md"} <= linked


FLAGS = dict(line.split(": ") for line in (ROOT / "tests/flags.txt").read_text().splitlines())
PROGRAM_OF_SCRIPT = {  # pattern of a script -> the program that gets its flags
    r"scripts/pretrain_.*(cpu|onegpu)": "main_pretrain",
    r"scripts/pretrain_": "submitit_pretrain",
    r"scripts/distill_.*onegpu": "main_distill",
    r"scripts/distill_": "submitit_distill",
    r"launch_(\w+)": r"eval_\1",
}
SHELL = {"cd", "export", "mkdir", "tar", "pip", "make", "hf"}
SNIPPETS = [snippet for page in RUN for snippet in snippets_of(page)]


def program_of(words: list[str]) -> str:
    """The name of the program in flags.txt that a command starts; a script must exist."""
    if words[0] == "pixio":
        assert words[1] in COMMANDS, words[1]
        return " ".join(words[:2])
    assert words[0] in ("python", "bash", "sbatch", "torchrun"), words[0]
    script = next(word for word in words if word.endswith((".py", ".sh")))
    assert any((ROOT / tree / script).exists() for tree in ("", *TREES)), script
    for pattern, program in PROGRAM_OF_SCRIPT.items():
        if match := re.search(pattern, script):
            return match.expand(program)
    return " ".join([Path(script).stem, *(["report"] if "report" in words else [])])


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.place)
def test_every_command_is_run_by_docs_check_or_listed_there_with_a_reason(snippet: Snippet):
    if snippet.python:
        ast.parse(snippet.bound)
    elif not snippet.left_out:
        assert not re.search(r"…|(?<![\w$])[A-Z]{3,}\b(?!=)", snippet.bound), "bind it in tests/docs_check.py"


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if not s.python], ids=lambda snippet: snippet.place)
def test_every_command_has_a_program_and_flags_that_exist(snippet: Snippet):
    words = [word for word in shlex.split(snippet.text) if not re.match(r"[A-Z_]+=", word)]
    if words[0] in SHELL:
        return
    program = program_of(words)
    if "benchmarks/" not in snippet.text:  # their flags are not in the list
        flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        assert flags - {"help", "nproc_per_node", "standalone"} <= set(FLAGS.get(program, "").split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_model_that_a_page_names_exists(page):
    named = set(re.findall(r"\bpixio_vit\w*?\d(?:_enc\w+)?(?=[\s`\",)]|\.pth)", page.read_text()))
    assert named <= {*pixio.list_models(), *vars(builders)}


def test_every_reason_for_not_running_a_command_is_needed():
    assert all(any(re.search(pattern, s.text) for s in SNIPPETS) for pattern in NOT_RUN)


@pytest.mark.slow
def test_the_notebook_runs_with_a_file_of_weights(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / "docs/pixio.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for given, small in {
        "SIZE = 256": "SIZE = 64",
        "TRAIN_ROOMS = 200": "TRAIN_ROOMS = 8",
        "300": "5",
    }.items():
        assert sum(given in cell.source for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(given, small)
    torch.save(pixio.pixio_vitfemto16(img_size=64).state_dict(), tmp_path / "encoder.pth")
    monkeypatch.setenv("PIXIO_WEIGHTS", str(tmp_path / "encoder.pth"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}
    ).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    assert "d1 on 40 unseen rooms" in shown[-1]["data"]["text/plain"]
