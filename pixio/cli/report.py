"""A run on one HTML page that needs nothing else: curves, reconstructions, configuration, evaluations.

Whatever was read from files is escaped, and the page forbids browsers to run or fetch anything.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import pixio
from pixio.cli import drawing
from pixio.cli.curves import save_curves
from pixio.files import read_json, write_text
from pixio.models.mae import PixioMAE
from pixio.synthetic.scenes import render

_MAX_PICTURE = 1 << 25  # bytes
_PNG = b"\x89PNG\r\n\x1a\n"
_FIRST_SCENE = 1 << 48  # far from the seeds of written scene trees
_SCENES = 4
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --quiet: #666; --line: #e4e4e4; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --quiet: #999; --line: #3a3a3a; --paper: #181818; } img { filter: brightness(0.85); }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 62em; margin: 2em auto; padding: 0 1em; overflow-wrap: anywhere; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin-top: 2em; } h3 { font-size: 1em; }
p.note { color: var(--quiet); margin-top: 0.3em; } img { max-width: 100%; margin: 0.8em 0; }
table { border-collapse: collapse; font-size: 0.9em; font-variant-numeric: tabular-nums; }
td, th { padding: 0.2em 1.2em 0.2em 0; border-bottom: 1px solid var(--line); }
td, th { text-align: left; vertical-align: top; font-weight: normal; }
th { color: var(--quiet); overflow-wrap: normal; } details { margin: 0.5em 0; }
"""


def write_report(
    run: str | Path, path: str | Path, images: Sequence[str] = (), results: Sequence[str | Path] = ()
) -> None:
    """Write the page of a run.

    Args:
        run: folder with `log.jsonl`, and perhaps `config.json` and `checkpoints/`.
        path: HTML file to write.
        images: files to reconstruct where the run's model can; rendered scenes when empty.
        results: folders in and below which `results.json` of evaluations lie, beside those in the run
            itself and those in folders beside it whose encoder came from the run.

    Raises:
        FileNotFoundError: no such run, results or image.
        ValueError: its log or a JSON file cannot be read.
    """
    run = Path(run).resolve()
    if not (run / "log.jsonl").is_file():
        raise FileNotFoundError(f"{run} is no run: it has no log.jsonl")
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    evaluations = _find_results(run, [Path(folder) for folder in results])
    # before the summary, because it explains a log that is none
    curves = _draw(lambda file: save_curves([run], file), "loss, learning rate and health over the steps")
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        f"<p class=note>{_summary(run / 'log.jsonl')}</p>",
        "<h2>Curves</h2>",
        curves,
        *_reconstructions(run, images, config),
        "<h2>Evaluation</h2>",
        *(_evaluation(file, content) for file, content in evaluations),
        ""
        if evaluations
        else "<p class=note>No results.json of an evaluation of this run lies in or beside it.</p>",
        "<h2>Configuration</h2>",
        _table(config) if config else "<p class=note>The run has no config.json.</p>",
    ]
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(run.name)}</title>
<style>{_STYLE}</style>
{chr(10).join(parts)}
</html>
"""
    write_text(path, page.encode(errors="replace").decode())


def _summary(log: Path) -> str:
    """How far a run has come, from the last whole line of its log."""
    last = json.loads(log.read_text(encoding="utf-8").rpartition("\n")[0].rpartition("\n")[2])
    told = [
        f"{name.replace('_', ' ')} {_show(last[name])}" for name in ("step", "images", "loss") if name in last
    ]
    day = datetime.fromtimestamp(log.stat().st_mtime).strftime("%d %B %Y, %H:%M")
    return html.escape(f"{', '.join(told)}; last logged on {day}")


# ------------------------------------------------------------------------------------------ reconstructions
def _reconstructions(run: Path, images: Sequence[str], config: dict[str, Any]) -> list[str]:
    """What the newest checkpoint makes of masked images; nothing for a run without checkpoints."""
    pointer = run / "checkpoints" / "latest"
    if not pointer.is_file():
        return []
    name = pointer.read_text().strip()
    if Path(name).name != name:
        raise ValueError(f"{pointer} holds {name[:80]!r}, which is not the name of a checkpoint")
    heading = "<h2>Reconstructions</h2>"
    try:
        mae = pixio.load_mae(pointer.parent / name).eval()
    except (ValueError, OSError) as error:
        if images:
            raise
        return [heading, f"<p class=note>None: {html.escape(str(error))}</p>"]
    mask_ratio = config.get("mask_ratio", 0.75)
    if not isinstance(mask_ratio, int | float) or not 0 <= mask_ratio <= 1:
        raise ValueError(
            f"{run / 'config.json'}: mask_ratio must be a number from 0 to 1, found {_show(mask_ratio)[:80]}"
        )
    pixels, names = _pixels(mae, images), [Path(image).stem for image in images]
    scenes = "" if images else " Rendered scenes that the run has not seen."

    def draw(file: BinaryIO) -> None:
        drawing.save_reconstructions(mae, pixels, file, mask_ratio, names=names)

    note = f"{html.escape(name)}, {100 * mask_ratio:g} % of the cells masked.{scenes}"
    return [heading, f"<p class=note>{note}</p>", _draw(draw, "reconstructions")]


def _pixels(mae: PixioMAE, images: Sequence[str]) -> Tensor:
    """The images to reconstruct, uint8 [B, 3, S, S]."""
    if images:
        return drawing.read_pixels(mae, images)
    size = mae.encoder.img_size[0]
    scenes = [render(_FIRST_SCENE + i, size).image for i in range(_SCENES)]
    return torch.stack([torch.from_numpy(scene).permute(2, 0, 1) for scene in scenes])  # [B, 3, S, S]


# ----------------------------------------------------------------------------------------------- evaluations
def _find_results(run: Path, folders: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """All `results.json` of a run; see `write_report`."""
    if missing := [str(folder.absolute()) for folder in folders if not folder.is_dir()]:
        raise FileNotFoundError(f"no folder {', '.join(missing)}")
    files = [file.resolve() for folder in (run, *folders) for file in sorted(folder.rglob("results.json"))]
    found = {file: read_json(file) for file in files}
    for file in sorted(run.parent.glob("*/results.json")):
        if file not in found:
            try:
                content = read_json(file)
            except ValueError:
                continue  # of somebody else; nothing says that it belongs to this run
            encoder = content.get("pretrained_ckp")
            if isinstance(encoder, str) and run in Path(encoder).resolve().parents:
                found[file] = content
    return list(found.items())


def _evaluation(file: Path, content: dict[str, Any]) -> str:
    """One evaluation: its metrics in a table, its picture, and everything else folded away."""
    title = " ".join(str(content[key]) for key in ("task", "dataset", "head") if key in content)
    panels = file.with_name("panels.png")
    return f"""<h3>{html.escape(title or file.parent.name)}</h3>
<p class=note>{html.escape(str(file))}</p>
{_grid(_metrics(content))}
{_embed(panels) if panels.is_file() else ""}
<details><summary>all of results.json</summary>{_table(content)}</details>"""


def _metrics(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics of an evaluation by row and column: last and best, or those of k-NN by k."""
    rows: dict[str, dict[str, Any]] = {}
    for kind, values in _inner(content, "last", "best"):
        for metric, value in values.items():
            cells = {kind: value}
            if isinstance(value, dict):  # the best, and when it was
                cells = {kind: value.get("value"), "at epoch": value.get("epoch")}
            rows[metric] = rows.get(metric, {}) | cells
    for _, neighbours in _inner(content, "k"):
        rows |= {f"k = {k}": values for k, values in _inner(neighbours, *neighbours)}
    return rows


def _inner(content: dict[str, Any], *keys: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects among some entries of an object; what was read may hold anything."""
    return [(key, content[key]) for key in keys if isinstance(content.get(key), dict)]


# ------------------------------------------------------------------------------------------------------ HTML
def _table(values: dict[str, Any]) -> str:
    """A table of names and values."""
    return _rows([key, _show(value)] for key, value in values.items())


def _grid(rows: dict[str, dict[str, Any]]) -> str:
    """A table with a heading over each column."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [[name, *(_show(cells.get(column, "")) for column in columns)] for name, cells in rows.items()]
    heading = "".join(f"<th>{html.escape(text)}</th>" for text in ("", *columns))
    return _rows(lines, f"<tr>{heading}</tr>")


def _rows(lines: Iterable[Sequence[str]], heading: str = "") -> str:
    """Lines of a table, whose first cell is the name of the others."""
    texts = ([html.escape(cell) for cell in line] for line in lines)
    rows = (f"<tr><th>{name}</th><td>{'</td><td>'.join(cells)}</td></tr>" for name, *cells in texts)
    return f"<table>{heading}{''.join(rows)}</table>"


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _draw(draw: Callable[[BinaryIO], object], what: str) -> str:
    file = io.BytesIO()
    draw(file)
    return _image(file.getvalue(), what)


def _embed(path: Path) -> str:
    """A PNG beside an evaluation; anything else is left out."""
    with open(path, "rb") as file:
        data = file.read(_MAX_PICTURE + 1)
    return _image(data, path.name) if data.startswith(_PNG) and len(data) <= _MAX_PICTURE else ""


def _image(data: bytes, what: str) -> str:
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
