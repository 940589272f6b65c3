"""What every evaluation program is told and how it starts: encoder file, output, device, ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from pixio.engine.config import option
from pixio.engine.program import program
from pixio.engine.runtime import Runtime, start_runtime

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of all evaluations."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it")
    pretrained_ckp: str | None = option(
        None, "weight file of the encoder; none: random weights, or those in hf/FOLDER", ("pretrained",)
    )
    output_dir: str | None = option(None, "output folder; by default one in runs/, named after the run")
    device: str = option("auto", "auto, cpu, mps or a GPU")
    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", "autocast dtype")
    deterministic: bool = option(False, "bitwise reproducible results on GPUs too, with slower kernels")
    port: int | None = option(None, "rendezvous port, if the launcher does not set one", ge=1, le=65_535)
    local_rank: int | None = option(
        None,
        "accepted because launchers pass it; ranks come from environment variables",
        ("local-rank",),
        ge=-1,
    )


def run_evaluation(name: str, config: EvaluationConfig, body: Callable[[Runtime], Result]) -> Result:
    """Start the ranks and run `body`; a mistake or a failure ends the program with one line.

    Args:
        name: of the program, in messages.
        config: of the run.
        body: the evaluation.
    """
    with program(name, "eval"):
        runtime = start_runtime(
            config.device,
            config.dtype,
            local_rank=config.local_rank,
            port=config.port,
            deterministic=config.deterministic,
        )
        try:
            return body(runtime)
        finally:
            runtime.close()
