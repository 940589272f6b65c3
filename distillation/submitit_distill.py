"""Submit `main_distill.py` to a SLURM cluster; it survives time limits, preemption and lost nodes.

    python submitit_distill.py --nodes 16 --ngpus 8 --partition gpu --teacher_pretrained FILE …

Takes the options of `main_distill.py` and those of the launcher (`--help` lists both).
"""

from dataclasses import dataclass
from pathlib import Path

from distill_config import DistillConfig

from pixio.engine.config import parse
from pixio.engine.slurm import LaunchConfig, launch


@dataclass(frozen=True)
class SubmitConfig(LaunchConfig, DistillConfig):
    """Submit a distillation run to SLURM."""


if __name__ == "__main__":
    launch(parse(SubmitConfig), Path(__file__).with_name("main_distill.py"))
