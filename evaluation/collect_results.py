"""One table of all evaluations on published data sets, beside the published numbers (Markdown).

    python collect_results.py [FOLDER …]        FOLDER: all below it is read; runs/ by default

Depth: RMSE in metres / d1 in per cent; segmentation: mean IoU in per cent; k-NN: top-1 in per cent, k = 10 or
the first --nb_knn. An encoder has two rows: the figures of the last epoch, and the best of all evaluations,
metric by metric; the published ones are the best. A run with --eval_only is in the first row alone. A star
marks a run that is not finished.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    ("knn", ""): "k-NN",
    ("nyuv2", "dpt"): "NYUv2 DPT",
    ("nyuv2", "linear"): "NYUv2 linear",
    ("kitti", "dpt"): "KITTI DPT",
    ("kitti", "linear"): "KITTI linear",
    ("ade20k", "dpt"): "ADE20K DPT",
    ("ade20k", "linear"): "ADE20K linear",
    ("pascal", "dpt"): "VOC DPT",
    ("pascal", "linear"): "VOC linear",
    ("loveda", "dpt"): "LoveDA DPT",
    ("loveda", "linear"): "LoveDA linear",
}
# In the order of COLUMNS; depth as RMSE / d1. Source: the Pixio paper (arXiv 2512.15715).
PUBLISHED = {
    "Pixio-5B/16": "68.4 | 0.238/- | - | 2.13/- | - | - | 50.2 | - | 82.0 | - | -",
    "Pixio-1B/16": "66.4 | 0.247/- | - | 2.17/- | - | - | 50.8 | - | 82.5 | - | -",
    "Pixio-H/16": (
        "63.2 | 0.268/95.5 | 0.366/90.8 | 2.210/96.7 | 3.494/90.3 | 53.6 | 50.2 | 85.9 | 82.2 | 54.7 | 53.9"
    ),
    "Pixio-L/16": "67.7 | 0.286/- | - | 2.33/- | - | - | 49.3 | - | 81.7 | - | -",
    "Pixio-B/16": "64.0 | 0.373/- | - | 2.78/- | - | - | 45.5 | - | 79.9 | - | -",
    "MAE-H/14": "- | -/80.8 | -/70.3 | -/90.9 | -/79.4 | 37.6 | 35.2 | 76.0 | 70.8 | 50.2 | 47.6",
    "DINOv2-g/14": "- | -/90.1 | -/75.3 | -/94.6 | -/78.1 | 51.5 | 49.0 | 85.2 | 81.8 | 55.0 | 51.9",
    "DINOv3-H+/16": "- | -/93.2 | -/76.3 | -/95.6 | -/73.2 | 52.3 | 50.3 | 85.6 | 82.1 | 55.3 | 52.7",
}

Cells = dict[tuple[str, str], str]


def collect(folders: list[Path]) -> dict[tuple[str, str], Cells]:
    """The rows, by encoder and kind of figure; of two runs for one cell the later file wins.

    Raises:
        ValueError: a results.json that is not one of this evaluation.
    """
    files = {file for folder in folders for file in folder.rglob("results.json")}
    rows: dict[tuple[str, str], Cells] = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime, file)):
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            encoder, column, figures = read_results(results)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} does not hold results of this evaluation: {error!r}") from error
        for kind, figure in figures.items():
            if column in COLUMNS:
                rows.setdefault((encoder, kind), {})[column] = figure
    return rows


def read_results(results: dict[str, Any]) -> tuple[str, tuple[str, str], dict[str, str]]:
    """Name of the encoder, key of the column, and its figures, "last" and "best", of one results.json."""
    encoder = f"{results['encoder']} {results['encoder_sha256'][:8]}"
    if results["task"] == "knn":
        figure = f"{results['k'][str(results['reported_k'])]['top1']:.1f}"
        return encoder, ("knn", ""), {"last": figure, "best": figure}
    config, rows = results["config"], {"last": results["last"]}
    if not config["eval_only"]:  # which knows one epoch of the training, not the best
        rows["best"] = {metric: entry["value"] for metric, entry in results["best"].items()}
    star = "" if config["eval_only"] or results["last"]["epoch"] == config["epochs"] else "*"
    figures = {
        kind: (
            f"{row['rmse']:.3f}/{row['d1']:.1f}" if results["task"] == "monodepth" else f"{row['miou']:.1f}"
        )
        + star
        for kind, row in rows.items()
    }
    return encoder, (results["dataset"], results["head"]), figures


def to_markdown(rows: dict[tuple[str, str], Cells]) -> str:
    """The table, our rows first."""
    lines = [" | ".join(("encoder", *COLUMNS.values())), "|".join(["---"] * (len(COLUMNS) + 1))]
    for (encoder, kind), cells in sorted(rows.items(), key=lambda row: (row[0][0], row[0][1] == "best")):
        lines.append(" | ".join((f"{encoder}, {kind}", *(cells.get(column, "-") for column in COLUMNS))))
    lines += [f"{name}, published | {cells}" for name, cells in PUBLISHED.items()]
    return "".join(f"| {line} |\n" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")])
    folders = parser.parse_args(argv).folders
    try:
        if missing := [str(folder) for folder in folders if not folder.is_dir()]:
            raise FileNotFoundError(f"no folder {', '.join(missing)}")
        rows = collect(folders)
    except (ValueError, OSError) as error:
        raise SystemExit(f"collect_results.py: error: {error}") from error
    if not rows:
        print(f"no results.json below {', '.join(map(str, folders))} yet", file=sys.stderr)
    print(to_markdown(rows), end="")


if __name__ == "__main__":
    main()
