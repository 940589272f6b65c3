"""The arrows between the rooms (who may import whom), checked from the source and in fresh interpreters."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = ("pretraining", "evaluation", "distillation")


def imports(path: Path) -> set[str]:
    """Absolute names of all modules a file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def assert_none_imports(paths: list[Path], *forbidden: str) -> None:
    assert paths
    for path in paths:
        bad = {
            name for name in imports(path) if any(name == f or name.startswith(f + ".") for f in forbidden)
        }
        assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}"


def test_engine_knows_no_model_no_data_and_no_tree():
    rooms = [f"pixio.{path.parent.name}" for path in (ROOT / "pixio").glob("*/__init__.py")]
    assert_none_imports(files("pixio/engine"), *(room for room in rooms if room != "pixio.engine"), *TREES)


def test_data_knows_no_engine_no_model_and_no_tree():
    above = [f"pixio.{room}" for room in ("models", "weights", "features", "dense", "engine", "cli")]
    assert_none_imports(files("pixio/data"), *above, *TREES)


@pytest.mark.parametrize("tree", [tree for tree in TREES if (ROOT / tree).is_dir()])
def test_trees_import_pixio_but_never_each_other(tree):
    assert_none_imports(files(tree), *(other for other in TREES if other != tree))


def test_only_runtime_ranks_and_parallel_know_device_words():
    words = re.compile(r"\bcuda\b|\bnccl\b|\bgloo\b|LOCAL_RANK|SLURM_PROCID")
    knowing = [ROOT / f"pixio/engine/{module}.py" for module in ("runtime", "ranks", "parallel")]
    for path in files("pixio", *TREES):
        if path not in knowing:
            assert not words.search(path.read_text()), path.relative_to(ROOT)


def test_nothing_loads_unsafely():
    unsafe = re.compile(r"weights_only=False|strict=False|yaml\.load\(|pickle\.loads?\(|allow_pickle=True")
    for path in files("pixio", *TREES):
        assert not unsafe.search(path.read_text()), path.relative_to(ROOT)


def test_import_pixio_loads_nothing_heavier_than_torch():
    code = """
import sys, torch
before = set(sys.modules)
import pixio
pixio.create_model("pixio_vitpico16")
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new == {"pixio"}, new
assert not any(name.startswith(("pixio.engine", "pixio.data", "pixio.cli.main")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_are_all_there_from_any_folder():
    code = """
import pixio
from pixio import *
assert pixio_vith16.__name__ == "pixio_vith16"
assert set(pixio.list_models()) | set(pixio.list_models(pretraining=True)) <= set(pixio.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "pixio")
