"""Requirements of the package and of its extras; they stand once, in requirements.txt."""

from pathlib import Path

from setuptools import setup

brings: dict[str, list[str]] = {"core": [], "all": []}  # extra -> requirements
for line in Path(__file__).with_name("requirements.txt").read_text().splitlines():
    requirement, _, names = (part.strip() for part in line.partition("#"))
    if requirement and requirement != "-e .":
        for extra in ["all", *names.split()]:
            brings.setdefault(extra, []).append(requirement)

brings["dev"] = [
    "hypothesis>=6.100",
    "ipykernel>=6.29",
    "mypy>=1.15",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "onnx>=1.18",
    "onnxruntime>=1.22",
    "onnxscript>=0.5",
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "scikit-image>=0.24",
    "scikit-learn>=1.5",
    "setuptools>=77",
    "torchmetrics>=1.4",
    "transformers>=5.0",
]
setup(install_requires=brings.pop("core"), extras_require=brings)
