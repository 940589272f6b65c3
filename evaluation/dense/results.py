"""Results of a probe: `results.json`."""

import json
from dataclasses import asdict
from typing import Any

from dense.probe import Probe

from pixio.files import write_json


def publish(probe: Probe, trained_on: int | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank 0 writes `results.json`, from all evaluations so far, and prints the metrics of the last.

    Args:
        probe: what was evaluated.
        trained_on: number of training images.
        rows: metrics of every evaluation, with `epoch` and `seconds` since the start, over all restarts.

    Returns:
        What the file holds.
    """
    config, last, best = probe.config, rows[-1], {}
    for metric, higher in probe.task.metrics.items():
        row = (max if higher else min)(rows, key=lambda row, metric=metric: row[metric])
        best[metric] = {"value": row[metric], "epoch": row["epoch"]}
    results = {
        "dataset": config.dataset,
        **probe.identity,
        "encoder": config.encoder,
        "pretrained_ckp": config.pretrained_ckp,
        "counts": {"train": trained_on, "val": len(probe.val)},
        "last": {metric: last[metric] for metric in ("epoch", *probe.task.metrics)},
        "best": best,
        "per_class": dict(zip(probe.predictor.class_names, last.get("iou", ()), strict=True)),
        "seconds": last["seconds"],
        "blocks": probe.frozen.block_ids,
        "window": dict(zip(("size", "stride"), probe.window, strict=True)),
        "ranks": probe.runtime.world_size,
        "device": probe.runtime.device.type,
        "config": asdict(config),
        "evaluations": rows,
    }
    results = json.loads(json.dumps(results, allow_nan=False))  # as the file holds them
    if probe.runtime.is_main:
        write_json(probe.output / "results.json", results)
        metrics = ", ".join(f"{metric} {last[metric]:.4g}" for metric in probe.task.metrics)
        print(f"{probe.output}: epoch {last['epoch']}: {metrics}", flush=True)
    return results
