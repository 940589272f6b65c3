"""Results of a probe: `results.json`."""

from dataclasses import asdict
from typing import Any

from dense.probe import Probe
from results import last_and_best, write_results


def publish(probe: Probe, trained_on: int | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank 0 writes `results.json`, from all evaluations so far, and prints the metrics of the last.

    Args:
        probe: what was evaluated.
        trained_on: number of training images.
        rows: metrics of every evaluation, with `epoch` and `seconds` since the start, over all restarts.

    Returns:
        What the file holds.
    """
    config, metrics, last = probe.config, probe.task.metrics, rows[-1]
    results = {
        "dataset": config.dataset,
        **probe.identity,
        "encoder": config.encoder,
        "pretrained_ckp": config.pretrained_ckp,
        "counts": {"train": trained_on, "val": len(probe.val)},
        **last_and_best(rows, metrics),
        "per_class": dict(zip(probe.predictor.class_names, last.get("iou", ()), strict=True)),
        "seconds": last["seconds"],
        "blocks": probe.frozen.block_ids,
        "window": dict(zip(("size", "stride"), probe.window, strict=True)),
        "ranks": probe.runtime.world_size,
        "device": probe.runtime.device.type,
        "config": asdict(config),
        "evaluations": rows,
    }
    return write_results(results, metrics, probe.output, probe.runtime)
