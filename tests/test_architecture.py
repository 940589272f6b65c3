"""Which subpackage may import which, checked from the source and in fresh interpreters."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
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


def subpackage(module: str) -> str:
    """The subpackage of a module of ours, `pixio` for the package itself: pixio.models.mae -> models."""
    return module.split(".")[min(1, module.count("."))]


def modules() -> dict[str, set[str]]:
    """Every module of the package, and the modules of the package that it imports."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files("pixio")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    return {name: (imports(path) & paths.keys()) - {name} for name, path in paths.items()}


def plain_names(tree: str) -> set[str]:
    """How the scripts of a tree import each other: the names of its modules and packages."""
    return {path.stem for path in (ROOT / tree).iterdir() if path.suffix == ".py" or path.is_dir()}


# From above to below; a subpackage imports from the rows below its own, and `pixio` itself (its public names)
# is imported by commands alone.
ROWS = (
    ("__main__",),
    ("cli",),
    ("pixio", "uniception"),
    ("dense", "features"),
    ("models",),
    ("weights",),
    ("data", "engine"),
    ("synthetic",),
    ("images",),
    ("files",),
)


def test_every_subpackage_imports_only_from_the_rows_below_its_own():
    height = {name: -row for row, subpackages in enumerate(ROWS) for name in subpackages}
    for module, imported in modules().items():
        for other in imported:
            if subpackage(module) != subpackage(other):
                assert height[subpackage(other)] < height[subpackage(module)], f"{module} imports {other}"


def test_the_engine_imports_nothing_of_ours_but_files():
    for module, imported in modules().items():
        if subpackage(module) == "engine":
            assert {subpackage(other) for other in imported} <= {"engine", "files"}, module


def test_data_and_weights_know_no_rank_and_no_device():
    for module, imported in modules().items():
        if subpackage(module) in ("data", "weights"):
            assert not imported & {f"pixio.engine.{name}" for name in ("runtime", "ranks", "parallel")}, (
                module
            )


def test_no_module_imports_itself_through_others():
    graph = {module: imported - {"pixio"} for module, imported in modules().items()}
    assert set(TopologicalSorter(graph).static_order()) >= graph.keys() - {"pixio"}  # or a CycleError


@pytest.mark.parametrize("tree", TREES)
def test_trees_import_pixio_and_their_own_modules_but_never_each_other(tree):
    others = set().union(*(plain_names(other) | {other} for other in TREES if other != tree))
    for path in files(tree):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & (others - plain_names(tree)), path.relative_to(ROOT)


def test_the_package_imports_no_tree():
    names = set().union(*(plain_names(tree) | {tree} for tree in TREES))
    for path in files("pixio"):
        assert not {name.split(".")[0] for name in imports(path)} & names, path.relative_to(ROOT)


def test_modules_are_short():
    for path in files("pixio", *TREES, "benchmarks", "assets", "tests"):
        lines = len(path.read_text().splitlines())
        assert lines <= (900 if path.parent.name == "tests" else 450), f"{path.relative_to(ROOT)}: {lines}"


def test_tests_and_benchmarks_import_without_changing_the_search_path():
    for path in files("tests", "benchmarks", *TREES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                used = ast.unparse(node)
                assert used not in ("sys.path.insert", "sys.path.append"), path.relative_to(ROOT)
                assert node.attr != "spec_from_file_location", path.relative_to(ROOT)


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
