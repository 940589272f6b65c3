"""Curation of web images: the scores by which an image is judged, their files, and what they let pass.

The statistics of a tar lie in one JSON file: member name -> record, an object with `width` and `height` (of
the upright image, pixels), `histogram_score` (`color_entropy`) and `mae_loss` (the reconstruction loss of a
first model), or `error` where the image is damaged.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from pixio.data.randomness import uniform
from pixio.data.shards import TarShard, is_url
from pixio.files import write_text
from pixio.images.decoding import DamagedDataError

SCORES = {"size": ("width", "height"), "entropy": ("histogram_score",), "loss": ("mae_loss",)}  # keys of each
ENTROPY_SIZE = 256  # side in pixels to which the whole image is resized
_LEVELS = 16  # per channel


def color_entropy(image: Tensor) -> float:
    """Entropy of the color histogram in bits: `histogram_score` of the curation statistics.

    The whole image is resized to 256 x 256, bicubic and antialiased. Red, green and blue (sRGB, as stored)
    are each cut into 16 equal ranges, and the entropy of the joint histogram of 16 x 16 x 16 = 4,096 bins is
    taken with logarithms of base 2: it lies between 0 (one color) and 12.

    2^4.5 = 23 equally frequent colors: that is where 4.5 separates. A text page is paper, ink and the few
    mixtures of both along the edges of letters; flat graphics have as many colors as their author chose; a
    blend of two colors is one line through the cube of bins and crosses at most 46 of them, few evenly;
    anything gray stays on the diagonal, at most 4 bits. A photograph in color spreads over hundreds of bins
    by light and shade. (So photographs in black and white are dropped together with scanned pages.)

    Args:
        image: uint8 [3, H, W], RGB, already resized.
    """
    levels = image.to(torch.int64) * _LEVELS // 256  # [3, H, W]
    bins = (levels[0] * _LEVELS + levels[1]) * _LEVELS + levels[2]  # [H, W]
    share = torch.bincount(bins.flatten(), minlength=_LEVELS**3).double() / bins.numel()  # [4096]
    return torch.special.entr(share).sum().item() / math.log(2)


def statistics_path(json_path: str, shard: TarShard) -> str | None:
    """Where the statistics of a tar lie; None for a URL without a parent folder and a name."""
    if is_url(shard.location):
        found = re.search(r"([^/\s]+)/([^/\s]+)\.tar\b", shard.location)
        if not found:
            return None
        folder, stem = found.groups()
    else:
        path = PurePath(shard.location)
        folder, stem = path.parent.name, path.stem
    return os.path.join(json_path, folder, f"{stem}.json")


def statistics_paths(shards: Sequence[TarShard], json_path: str) -> list[str]:
    """Where the statistics of each tar belong.

    Raises:
        ValueError: two tars claim one file, or a URL names none.
    """
    owners: dict[str, str] = {}
    for shard in shards:
        path = statistics_path(json_path, shard)
        if path is None:
            raise ValueError(f"{shard.name} has no parent folder and name that could name its statistics")
        if path in owners:
            raise ValueError(f"{shard.name} and {owners[path]} would share {path}; rename a folder")
        owners[path] = shard.name
    return list(owners)


def read_statistics(path: str | Path) -> dict[str, Any]:
    """The records of a tar by member name.

    Raises:
        DamagedDataError: not a JSON object.
        OSError: the file cannot be read.
    """
    try:
        records = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedDataError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(records, dict):
        raise DamagedDataError(f"{path} holds a JSON {type(records).__name__}, not an object of members")
    return records


def known_records(path: str | Path) -> dict[str, dict[str, Any]]:
    """The well-formed records of a tar by member name; none where there is no readable file."""
    try:
        return {name: record for name, record in read_statistics(path).items() if isinstance(record, dict)}
    except (DamagedDataError, OSError):
        return {}


def write_statistics(path: str | Path, records: dict[str, dict[str, Any]]) -> None:
    """Write a tar's records; scores that the file holds already and `records` lack are kept."""
    known = known_records(path)
    for name, record in records.items():
        if "error" not in record:
            record = known.get(name, {}) | record
            records[name] = {
                key: record[key] for key in chain(*SCORES.values()) if has_scores(record, (key,))
            }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(records, allow_nan=False))


def has_scores(record: Any, keys: Sequence[str]) -> bool:
    """Whether what the statistics hold for an image has a finite number under each key."""
    return isinstance(record, dict) and all(
        isinstance(value := record.get(key), int | float) and abs(value) < math.inf for key in keys
    )


@dataclass(frozen=True)
class Curation:
    """Which images of a web-scale set are worth training on, by statistics computed beforehand.

    The statistics of a tar lie at `json_path/<parent folder>/<tar stem>.json` (or `<tar name>.json`). A tar
    without its file, or a member that is not in it or has an `error` there, is skipped.

    Args:
        json_path: folder of the statistics.
        hist_thresh: drop images with histogram_score <= this (4.5 in the paper: text and flat graphics).
        imgres_thresh: drop images with a side below this, in pixels (320 in the paper).
        soft_sampling: keep an image, at each visit anew, with probability min(mae_loss, 1).
    """

    json_path: str
    hist_thresh: float | None = None
    imgres_thresh: int | None = None
    soft_sampling: bool = False

    def __post_init__(self) -> None:
        if not os.path.isdir(self.json_path):
            place = os.path.abspath(self.json_path)
            raise FileNotFoundError(f"json_path {place} is not a folder of curation statistics")

    def load(self, shard: TarShard) -> dict[str, Any] | None:
        """Read the statistics of a tar.

        Returns:
            Member name -> record, or None without a file.

        Raises:
            DamagedDataError: the file is not a JSON object.
            OSError: the file cannot be read.
        """
        path = statistics_path(self.json_path, shard)
        if path is None:
            return None
        file = next(filter(os.path.isfile, (path, path.removesuffix(".json") + ".tar.json")), None)
        return read_statistics(file) if file else None

    def rejects(self, record: Any, *key: int | str) -> str | None:
        """The reason to drop an image, or None to keep it; `key` seeds the draw of this visit."""
        if isinstance(record, dict) and "error" in record:
            return "damaged"
        needed = ["histogram_score"] * (self.hist_thresh is not None)
        needed += ["width", "height"] * (self.imgres_thresh is not None)
        needed += ["mae_loss"] * self.soft_sampling
        if not has_scores(record, needed):
            return "no_statistics"
        if self.hist_thresh is not None and not record["histogram_score"] > self.hist_thresh:
            return "histogram"
        if self.imgres_thresh is not None and min(record["width"], record["height"]) < self.imgres_thresh:
            return "resolution"
        if self.soft_sampling and not uniform("accept", *key) < record["mae_loss"]:
            return "sampled_out"
        return None
