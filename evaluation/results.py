"""What the results of all trained evaluations have in common."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixio.engine.runtime import Runtime
from pixio.files import write_json


def last_and_best(rows: list[dict[str, Any]], metrics: Mapping[str, bool]) -> dict[str, Any]:
    """The last value of every metric, and the best with its epoch.

    Args:
        rows: metrics of every evaluation, with their `epoch`.
        metrics: name -> whether higher is better.
    """
    best = {}
    for metric, higher in metrics.items():
        row = (max if higher else min)(rows, key=lambda row, metric=metric: row[metric])
        best[metric] = {"value": row[metric], "epoch": row["epoch"]}
    return {"last": {metric: rows[-1][metric] for metric in ("epoch", *metrics)}, "best": best}


def write_results(
    results: dict[str, Any], metrics: Mapping[str, bool], output: Path, runtime: Runtime
) -> dict[str, Any]:
    """Rank 0 writes `results.json` and prints the last metrics; returns what the file holds."""
    results = json.loads(json.dumps(results, allow_nan=False))
    if runtime.is_main:
        write_json(output / "results.json", results)
        last = results["last"]
        text = ", ".join(f"{metric} {last[metric]:.4g}" for metric in metrics)
        print(f"{output}: epoch {last['epoch']}: {text}", flush=True)
    return results
