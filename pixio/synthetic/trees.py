"""Rendered scenes written to disk in the layouts of public data sets: same file names, bit depths and units.

Loaders and commands made for those data sets run on the trees as they are. `write_tree` renders the items and
puts the files in place; `layouts.py` says which files an item becomes and what they hold.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pixio.files import read_json, write_atomic
from pixio.synthetic.layouts import LAYOUTS, SEEDS_PER_SPLIT, SPLITS, Group
from pixio.synthetic.scenes import VERSION


@dataclass(frozen=True)
class TreeSummary:
    """A finished tree."""

    root: Path
    layout: str
    train: int  # images
    val: int
    files: int  # in all, beside scenes.json
    written: int  # by this call; 0 where the tree was complete already


def write_tree(
    layout: str,
    root: str | Path,
    train: int,
    val: int | None,
    size: int,
    seed: int = 0,
    workers: int = 0,
    per_tar: int = 1000,
) -> TreeSummary:
    """Render scenes into a folder laid out as a public data set.

    The same arguments give the same bytes, whatever `workers` is. Every file is whole or
    absent; `scenes.json`, written last, holds the arguments. An identical call resumes an interrupted one
    and leaves a finished tree alone. Training and validation scenes never share a seed, nor do trees of
    different `seed`; trees of different layouts and the same `seed` show the same scenes.

    Args:
        layout: a key of `LAYOUTS`.
        root: the folder to make or resume.
        train, val: number of images of each split; None is 100 validation images where the layout has any.
        size: side of the square images in pixels; for nyuv2 and kitti the height that is rendered, then
            resampled to their resolution.
        seed: any integer >= 0.
        workers: processes that render; 0 renders in this one.
        per_tar: images in each tar, for imagenet-tars and web-tars.

    Returns:
        What the folder holds now.

    Raises:
        ValueError: for an unknown layout, a number out of range, or a root that holds anything else.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    rules = LAYOUTS[layout]
    val = min(100, rules.capacity[1]) if val is None else val
    _check_numbers(layout, train=train, val=val, size=size, seed=seed, workers=workers, per_tar=per_tar)
    root = Path(root)
    request = {"layout": layout, "train": train, "val": val, "size": size, "seed": seed, "renderer": VERSION}
    request |= {"per_tar": per_tar} if rules.in_tars else {}
    groups = [
        Group(split, number, seeds, size)
        for split, count in zip(SPLITS, (train, val), strict=True)
        for number, seeds in enumerate(_seeds(split, count, seed, per_tar if rules.in_tars else 1))
    ]
    lists = rules.lists(groups)
    files = len(lists) + sum(len(rules.paths(group)) for group in groups)
    finished, begun = root / "scenes.json", root / "scenes.partial.json"
    if root.exists() and any(not path.name.startswith(".") for path in root.iterdir()):
        _check_same(root, finished if finished.exists() else begun, request)
        if finished.exists():
            return TreeSummary(root, layout, train, val, files, written=0)
    else:
        _write(begun, json.dumps(request, indent=2).encode())
    missing = [group for group in groups if not all((root / path).exists() for path in rules.paths(group))]
    written = len(lists) + sum(_write_groups(layout, root, missing, workers))
    for path, text in lists.items():
        _write(root / path, text.encode())
    os.replace(begun, finished)
    return TreeSummary(root, layout, train, val, files, written)


def _check_numbers(layout: str, **numbers: int) -> None:
    """Refuse numbers that no tree can have, and more images than the layout has names for."""
    for name, value in numbers.items():
        least = 1 if name in ("size", "per_tar") else 0
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for split, capacity in zip(SPLITS, LAYOUTS[layout].capacity, strict=True):
        if numbers[split] > capacity:
            raise ValueError(
                f"layout {layout} holds at most {capacity} {split} images, {numbers[split]} were asked for: "
                f"give --{split} {capacity}"
            )


def _check_same(root: Path, record: Path, request: dict[str, object]) -> None:
    """Refuse a folder that was not begun with the same request."""
    if not record.exists():
        raise ValueError(f"{root} is not empty and holds no rendered tree; choose an empty or new folder")
    found = read_json(record)
    if found != request:
        raise ValueError(
            f"{root} holds another rendered tree: made with {json.dumps(found)}, not {json.dumps(request)}; "
            "choose another folder or delete this one"
        )


def _seeds(split: str, count: int, seed: int, stride: int) -> Iterator[range]:
    """The scenes of a split in runs of `stride`: 2^32 seeds belong to each split of each tree."""
    first = (2 * seed + SPLITS.index(split)) * SEEDS_PER_SPLIT
    for start in range(0, count, stride):
        yield range(first + start, first + min(start + stride, count))


def _write_groups(layout: str, root: Path, groups: list[Group], workers: int) -> Iterator[int]:
    if workers == 0:
        yield from (_write_group(layout, root, group) for group in groups)
        return
    # Fresh processes: the caller may hold threads, which do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_end_with_parent) as pool:
        yield from pool.map(_write_group, [layout] * len(groups), [root] * len(groups), groups)


def _end_with_parent() -> None:
    """In a worker: leave when the program that waits for its work is killed."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_group(layout: str, root: Path, group: Group) -> int:
    paths = LAYOUTS[layout].paths(group)
    for path, content in zip(paths, LAYOUTS[layout].contents(group), strict=True):
        _write(root / path, content)
    return len(paths)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(content))
