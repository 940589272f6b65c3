"""A wheel in a fresh environment, with the packages of one extra at a time, runs what that extra promises."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pixio", "pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE")
TINY = "--input_size 64 --device cpu --num_workers 0"
PRETRAIN = (
    f"--model pixio_vitpico16_enc128x6h4_dec128x2h4 {TINY} --batch_size 2 --data_path tars --mask_grid 2"
)
DISTILL = f"--teacher_model pixio_vitpico16 --teacher_pretrained pretrain/encoder.pth {TINY} --batch_size 2"
STEPS = "--epochs 1 --iters_per_epoch 2 --warmup_epochs 0 --lr 1e-3 --dtype fp32"
PROMISES = {
    "core": [
        "-c 'import pixio, torch; from pixio.dense import DPTHead, LinearHead; torch.save("
        'pixio.pixio_vitpico16(img_size=64).state_dict(), "w.pth"); '
        'pixio.pixio_vitpico16("w.pth", img_size=64)(torch.zeros(1, 3, 64, 64))\'',
        "-m pixio info pixio_vitpico16",
    ],
    "cli": [
        "-m pixio scenes imagenet-folders images --train 3 --val 1 --size 64",
        "-c 'import pixio, torch; torch.save(pixio.pixio_vitpico16().state_dict(), \"w.pth\")'",
        "-m pixio features images --pretrained w.pth --size 64 --output features.npz",
        "-m pixio pca images/*/*/*.JPEG --pretrained w.pth --size 64 --output pca.png",
        "-m pixio explore images/*/*/*.JPEG --pretrained w.pth --size 64 --output explore.html",
        "-m pixio convert w.pth hf --to transformers",
    ],
    "train": [
        "-m pixio scenes imagenet-tars tars --train 8 --val 0 --size 64",
        f"{ROOT}/pretraining/main_pretrain.py {PRETRAIN} {STEPS} --output_dir pretrain",
        f"{ROOT}/distillation/main_distill.py {DISTILL} {STEPS} --data_path tars --output_dir distill"
        " --student_models pixio_vitfemto16 --mask_grid 2",
        f"{ROOT}/pretraining/submitit_pretrain.py --help",
    ],
    "eval": [
        "-m pixio scenes imagenet-folders folders --train 8 --val 2 --size 64",
        f"{ROOT}/evaluation/eval_knn.py --encoder pixio_vitpico16 --data_path folders {TINY} --nb_knn 3"
        " --output_dir knn",
        f"{ROOT}/evaluation/eval_monodepth.py --help",
        f"{ROOT}/evaluation/eval_semseg.py --help",
    ],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder)
    return next(folder.glob("*.whl"))


def pip(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, words)], check=True)


def metadata(wheel: Path) -> Distribution:
    folders = zipfile.Path(wheel).iterdir()
    return PathDistribution(next(folder for folder in folders if folder.name.endswith(".dist-info")))


def required(package: Distribution, extra: str) -> dict[str, Distribution]:
    """All that an installer would bring with a package, by name, from what is installed here."""
    found: dict[str, Distribution] = {}
    waiting = [(package, extra)]
    while waiting:
        package, extra = waiting.pop()
        for text in package.requires or ():
            requirement = Requirement(text)
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            new = name not in found
            found.setdefault(name, distribution(name))
            assert requirement.specifier.contains(found[name].version, prereleases=True), text
            waiting += [(found[name], wanted) for wanted in (*requirement.extras, *[""] * new)]
    return found


@pytest.fixture
def install(wheel, tmp_path):
    """Function that makes an environment with the wheel and what it requires with an extra; its python."""

    def make(extra: str) -> Path:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
        python = tmp_path / "env/bin/python"
        pip("--python", python, "install", "--no-deps", "--no-index", wheel)
        scheme = {"base": tmp_path / "env", "platbase": tmp_path / "env"}
        site = Path(sysconfig.get_path("purelib", vars=scheme))
        for package in required(metadata(wheel), extra).values():
            for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(package.locate_file(top))
        return python

    return make


@pytest.mark.slow
@pytest.mark.parametrize("extra", PROMISES)
def test_a_wheel_with_one_extra_alone_runs_what_the_extra_promises(extra, install, tmp_path):
    python = install(extra)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path)}
    for command in PROMISES[extra]:
        ran = subprocess.run(
            f"{python} {command}", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"


def test_the_wheel_says_its_types_and_all_takes_the_whole_list(wheel):
    assert "pixio/py.typed" in zipfile.ZipFile(wheel).namelist()
    requirements = [Requirement(text) for text in metadata(wheel).requires]
    listed = (ROOT / "requirements.txt").read_text().splitlines()
    assert listed[-1] == "-e ."
    packages = {Requirement(line.partition("#")[0]).name for line in listed[:-1] if line[0] != "#"}
    brought = {
        extra: {r.name for r in requirements if r.marker and r.marker.evaluate({"extra": extra})}
        for extra in ("cli", "train", "eval", "all")
    }
    assert brought["all"] == packages
    assert brought["cli"] | brought["train"] | brought["eval"] | {"torch"} == packages
    assert [r.name for r in requirements if not r.marker] == ["torch"]
