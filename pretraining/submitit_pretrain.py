"""Submit `main_pretrain.py` to a SLURM cluster; it survives time limits, preemption and lost nodes.

    python submitit_pretrain.py --nodes 16 --ngpus 8 --partition gpu --data_path DIR …

Takes the options of `main_pretrain.py` and those of the launcher (`--help` lists both).
"""

from dataclasses import dataclass
from pathlib import Path

from main_pretrain import PretrainConfig

from pixio.engine.config import parse
from pixio.engine.slurm import LaunchConfig, launch


@dataclass(frozen=True)
class SubmitConfig(LaunchConfig, PretrainConfig):
    """Submit a pre-training run to SLURM."""


if __name__ == "__main__":
    launch(parse(SubmitConfig), Path(__file__).with_name("main_pretrain.py"))
