"""How runs went: loss, learning rate and health over the steps, drawn and compared with an expected run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from pixio.files import read_json, write_json
from pixio.images.figures import figure, open_axes
from pixio.models.health import LEAST_VARIANCE

Series = dict[str, np.ndarray]  # name -> a value for each logged step, NaN where there is none

POINTS = 10  # of an expected run
EXPECTED = ("loss", "grad_norm", "held_out_loss", "health/variance", "health/mean_square", "health/rank")
_HEALTH = {
    "variance": "variance after the final norm",
    "mean_square": "mean square of the stream",
    "rank": "directions in use",
}
_SMOOTHING = 50  # points of a curve that a moving mean covers, at most


def save_curves(
    logs: Sequence[str | Path], path: str | Path | BinaryIO, expected: str | Path | None = None
) -> None:
    """Draw loss and learning rate over the steps of one or several runs and, where they log it, their health.

    A long log is drawn pale, with its moving mean on top; losses on held-out images are dashed.

    Args:
        logs: `log.jsonl` files, or the folders they lie in.
        path: picture to write; a file object receives a PNG.
        expected: file of `save_expected`, drawn as black dots.

    Raises:
        FileNotFoundError: no such log or file.
        ValueError: a log without any step, a line that is none, or a file that holds no expected run.
    """
    runs = [(_name_of(Path(log)), read_log(Path(log))) for log in logs]
    points = read_expected(expected) if expected else {}
    healthy = any(name.endswith("health/variance") for _, series in runs for name in series)
    with figure(path, 7, 5 if healthy else 2.7) as drawn:
        rows = drawn.subfigures(2, 1) if healthy else [drawn]
        loss, lr = rows[0].subplots(1, 2, width_ratios=(2, 1))
        for name, series in runs:
            line = _plot_smooth(loss, series["step"], series["loss"], name)
            if "held_out_loss" in series:
                label = "held out" if len(runs) == 1 else None
                _plot(loss, series, "held_out_loss", color=line, linestyle="--", marker=".", label=label)
            lr.plot(series["step"], series["lr"], linewidth=1.3, color=line)
        loss.set(xlabel="step", ylabel="loss")
        lr.set(xlabel="step", ylabel="learning rate")
        lr.ticklabel_format(axis="y", scilimits=(-2, 2))
        axes = [loss, lr]
        _dots(loss, points, "loss")
        if healthy:
            axes += (health := list(rows[1].subplots(1, 3)))
            _plot_health(health, runs, points)
        open_axes(*axes)
        for axis in axes:
            axis.locator_params(axis="x", nbins=5)
        if len(runs) > 1 or points or any("held_out_loss" in series for _, series in runs):
            loss.legend()


def _plot_health(axes: Sequence[Axes], runs: Sequence[tuple[str, Series]], points: Series) -> None:
    """Every model's health: of a distillation the teacher's (dotted) and each student's."""
    for axis, (quantity, label) in zip(axes, _HEALTH.items(), strict=True):
        for number, (_, series) in enumerate(runs):
            for name in series:
                if name.endswith(f"health/{quantity}"):
                    teacher = name.startswith("teacher/")
                    style = {"linestyle": ":", "color": "gray"} if teacher else {"color": f"C{number}"}
                    _plot(axis, series, name, **style)
        first = runs[0][1]
        axis.axvline(first["step"][np.nanargmax(first["lr"])], color="0.7", linewidth=1, zorder=0)  # warm-up
        axis.set(xlabel="step", ylabel=label)
        _dots(axis, points, f"health/{quantity}")
    variance, mean_square, rank = axes
    variance.axhspan(0, LEAST_VARIANCE, color="C3", alpha=0.15, linewidth=0)
    variance.set(ylim=(0, 1))
    mean_square.set(yscale="log")
    mean_square.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7), numticks=8))
    mean_square.yaxis.set_major_formatter("{x:g}")
    mean_square.yaxis.set_minor_formatter(NullFormatter())
    rank.set(ylim=(0, None))


def _plot(axis: Axes, series: Series, name: str, **style: Any) -> None:
    known = np.isfinite(series[name])
    axis.plot(series["step"][known], series[name][known], linewidth=1.3, **style)


def _plot_smooth(axis: Axes, steps: np.ndarray, values: np.ndarray, label: str) -> str:
    """A curve, or where it is long its moving mean over it; returns its color."""
    window = min(_SMOOTHING, len(values) // 10)
    if window <= 1:
        return axis.plot(steps, values, linewidth=1.3, label=label)[0].get_color()
    color = axis.plot(steps, values, linewidth=0.6, alpha=0.3)[0].get_color()
    axis.plot(
        _moving_mean(steps, window), _moving_mean(values, window), linewidth=1.3, color=color, label=label
    )
    return color


def _dots(axis: Axes, points: Series, name: str) -> None:
    if name in points:
        axis.plot(points["step"], points[name], "o", color="black", markersize=3, label="expected", zorder=3)


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each `window` neighbors, without those that are NaN."""
    known, ones = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(known, values, 0), ones, "valid")
    return sums / np.maximum(np.convolve(known, ones, "valid"), 1)


# ------------------------------------------------------------------------------------------ expected runs
def save_expected(log: str | Path, path: str | Path) -> None:
    """Write what others may expect of a run of the same options: `POINTS` points of each of `EXPECTED`.

    Losses and gradient norms are means over the steps around a point, the others the nearest that was logged.

    Args:
        log: `log.jsonl` file, or the folder it lies in; `config.json` beside it is told, not where it lay.
        path: JSON file to write.

    Raises:
        FileNotFoundError, ValueError: see `save_curves`.
    """
    series, config = read_log(Path(log)), _log_file(Path(log)).with_name("config.json")
    last = series["step"][-1]
    points = {"step": [round(last * (i + 1) / POINTS) for i in range(POINTS)]}
    for name in EXPECTED:
        if name in series:
            known = np.isfinite(series[name])
            steps, values = series["step"][known], series[name][known]
            smooth = name in ("loss", "grad_norm")
            points[name] = [_around(steps, values, at, last / POINTS / 2 * smooth) for at in points["step"]]
    told = read_json(config) if config.is_file() else {}
    where = ("output_dir", "log_dir")  # of this run: others will lie elsewhere
    write_json(path, {"config": {k: v for k, v in told.items() if k not in where}, "points": points})


def _around(steps: np.ndarray, values: np.ndarray, at: float, reach: float) -> float:
    """Mean of the values within `reach` of a step, or the nearest."""
    distance = np.abs(steps - at)
    near = distance <= max(reach, distance.min())
    return float(f"{values[near].mean():.4g}")


def read_expected(path: str | Path) -> Series:
    """The points in a file of `save_expected`."""
    content = read_json(Path(path))
    try:
        points = {name: np.array(values, dtype=float) for name, values in content["points"].items()}
        if "loss" not in points or {len(values) for values in points.values()} != {len(points["step"])}:
            raise ValueError("step, loss and equally many of each")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'{path} holds no expected run: its "points" need {error}') from None
    return points


# ----------------------------------------------------------------------------------------------- reading
def read_log(log: Path) -> Series:
    """Every number of a log, inner ones under `outer/inner`; null, a number that was not finite, is NaN."""
    file = _log_file(log)
    try:
        text = file.read_text(encoding="utf-8")
        # a run that was killed may have left its last line unfinished
        rows = [_flatten(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]
        required = {key: [row[key] for row in rows] for key in ("step", "loss", "lr")}
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names} | required
        series = {name: np.array(values, dtype=float) for name, values in columns.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{file} is no log of a run: expected step, loss and lr in each line ({error})"
        ) from None
    if not rows:
        raise ValueError(f"{file} holds no steps yet")
    return series


def _flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Numbers and nulls of a row."""
    found: dict[str, float | None] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= _flatten(value, f"{prefix}{name}/")
        elif value is None or isinstance(value, int | float):
            found[prefix + name] = value
    return found


def _log_file(log: Path) -> Path:
    return log / "log.jsonl" if log.is_dir() else log


def _name_of(log: Path) -> str:
    """A log is called as its folder."""
    return _log_file(log).resolve().parent.name
