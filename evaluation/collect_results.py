"""One table of all evaluations, beside the published numbers."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixio.engine.config import option, parse
from pixio.engine.program import program
from pixio.files import read_json

NAMES = {"nyuv2": "NYUv2", "kitti": "KITTI", "ade20k": "ADE20K", "pascal": "VOC", "loveda": "LoveDA"}
HEADS = {"dpt": "DPT", "linear": "linear"}
COLUMNS = {("knn", ""): "k-NN"} | {
    (dataset, head): f"{NAMES[dataset]} {HEADS[head]}" for dataset in NAMES for head in HEADS
}

Cells = dict[tuple[str, str], str]


@dataclass(frozen=True)
class TableConfig:
    """One table of all evaluations on published data sets, beside the published numbers (Markdown).

    Depth: RMSE in meters / d1 in percent; segmentation: mean IoU in percent; k-NN: top-1 in percent, k = 10
    or the first --nb_knn. Each encoder has two rows: the metrics of the last epoch, and the best of all
    epochs, metric by metric; the published numbers (Pixio paper, arXiv 2512.15715) are the best. A run with
    --eval_only is only in the first row. A star marks an unfinished run.
    """

    folders: tuple[Path, ...] = option(
        (Path("runs"),), "folders to search, with their subfolders, for results.json", positional=True
    )


def collect(folders: Sequence[Path]) -> dict[tuple[str, str], Cells]:
    """The rows, by encoder and "last" or "best"; of two runs for one cell the later file wins.

    Raises:
        ValueError: a results.json that is not one of this evaluation.
    """
    files = {file for folder in folders for file in folder.rglob("results.json")}
    rows: dict[tuple[str, str], Cells] = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime, file)):
        try:
            encoder, column, cells = read_results(read_json(file))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} does not hold results of this evaluation: {error!r}") from error
        for kind, cell in cells.items():
            if column in COLUMNS:
                rows.setdefault((encoder, kind), {})[column] = cell
    return rows


def read_results(results: dict[str, Any]) -> tuple[str, tuple[str, str], dict[str, str]]:
    """Name of the encoder, key of the column, and cells for "last" and "best", of one results.json."""
    encoder = f"{results['encoder']} {results['encoder_sha256'][:8]}"
    if results["task"] == "classify" or results["config"].get("train_blocks", "0") != "0":
        return encoder, (results["task"], "trained"), {}  # the table is of frozen encoders
    if results["task"] == "knn":
        top1 = f"{results['k'][str(results['reported_k'])]['top1']:.1f}"
        return encoder, ("knn", ""), {"last": top1, "best": top1}
    config, rows = results["config"], {"last": results["last"]}
    if not config["eval_only"]:  # which knows one epoch of the training, not the best
        rows["best"] = {metric: entry["value"] for metric, entry in results["best"].items()}
    star = "" if config["eval_only"] or results["last"]["epoch"] == config["epochs"] else "*"
    template = "{rmse:.3f}/{d1:.1f}" if results["task"] == "monodepth" else "{miou:.1f}"
    cells = {kind: template.format(**row) + star for kind, row in rows.items()}
    return encoder, (results["dataset"], results["head"]), cells


def to_markdown(rows: dict[tuple[str, str], Cells]) -> str:
    """The table, our rows first."""
    lines = [" | ".join(("encoder", *COLUMNS.values())), "|".join(["---"] * (len(COLUMNS) + 1))]
    for (encoder, kind), cells in sorted(rows.items(), key=lambda row: (row[0][0], row[0][1] == "best")):
        lines.append(" | ".join((f"{encoder}, {kind}", *(cells.get(column, "-") for column in COLUMNS))))
    published = Path(__file__).with_name("published.md").read_text(encoding="utf-8")
    return "".join(f"| {line} |\n" for line in lines) + published


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    folders = parse(TableConfig, argv, prog="collect_results.py").folders
    with program("collect_results.py", "eval"):
        if missing := [str(folder.absolute()) for folder in folders if not folder.is_dir()]:
            raise FileNotFoundError(f"no folder {', '.join(missing)}")
        rows = collect(folders)
        if not rows:
            print(f"no results.json below {', '.join(map(str, folders))} yet", file=sys.stderr)
        print(to_markdown(rows), end="")


if __name__ == "__main__":
    main()
