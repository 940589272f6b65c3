"""Features on disk: folders that are written part by part, in any number of runs and ranks, or one file.

A part is complete once its own index, `part_000000.jsonl`, is there; `settings.json` says what all parts were
made of. A part holds its images' arrays in one of three layouts:

    safetensors  `part_000000.safetensors` with an array under each `NAME/ARRAY`
    npy          `part_000000.ARRAY.npy`, which has the readable images of the part as its first axis
    stacked      `part_000000.safetensors` with the same under each `ARRAY`, which `StoredArray` maps
"""

import bisect
import hashlib
import itertools
import json
import sys
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pixio.data.shards import FOLDER_CHUNK, FolderShard, Shard
from pixio.features.extraction import (
    Arrays,
    FeatureExtractor,
    ImageRecord,
    ShardRange,
    TokenFeatures,
    index_shards,
)
from pixio.files import read_json, remove_leftovers, require_free, write_atomic, write_json, write_text

FORMATS = ("safetensors", "npy")  # layouts of `write_folder`
INDEX, SETTINGS = "index.jsonl", "settings.json"


class Summary(NamedTuple):
    """Images whose features were computed now and earlier, and messages about images that cannot be read and
    about tars that have lost some.
    """

    computed: int
    earlier: int
    errors: list[str]


def write_file(path: Path, extractor: FeatureExtractor, shards: Sequence[Shard]) -> Summary:
    """Write the features of a few images into one file, as `NAME/ARRAY`.

    Args:
        path: ends in .npz or .safetensors.
        extractor: how they are computed.
        shards: the images.

    Raises:
        ValueError: an image that cannot be read; two of one name (in a tar); see also `FeatureExtractor.run`.
    """
    features: dict[str, Tensor] = {}
    parts, damaged, _ = index_shards(shards, FOLDER_CHUNK)
    with _progress(parts) as bar:
        for images, arrays in extractor.run(shards, parts, bar.update):
            _refuse_unreadable(images)
            _add_named(features, images, arrays)
    if path.suffix == ".npz":
        content = {name: array.numpy() for name, array in features.items()}
        write_atomic(path, lambda file: np.savez(file, **content))
    else:
        _write_safetensors(path, features)
    return Summary(_count(parts), 0, damaged)


def write_folder(
    folder: Path,
    extractor: FeatureExtractor,
    shards: Sequence[Shard],
    format: str = "safetensors",
    per_file: int = FOLDER_CHUNK,
) -> Summary:
    """Collective: write the arrays of `TokenFeatures` into a folder; what earlier runs completed is kept.

    A line of `index.jsonl` is an object with `image`, and either `part`, `row` (within the part) and `size`
    ([height, width] in pixels), or `error`.

    Args:
        folder: made when missing.
        extractor: how they are computed.
        shards: the images.
        format: one of `FORMATS`; `npy` needs maps of one size.
        per_file: images of a part, at most; see also `find_images`.

    Raises:
        ValueError: the folder holds features of other images or settings; two images of one name
            in one file of safetensors; see also `FeatureExtractor.run`.
    """
    spec = extractor.spec
    if not isinstance(spec, TokenFeatures):
        raise ValueError(f"a folder holds TokenFeatures, the extractor computes {type(spec).__name__}")
    if format not in FORMATS:
        raise ValueError(f"unknown format '{format}': choose one of {', '.join(FORMATS)}")
    if format == "npy" and spec.transform.fit != "square" and "patch_tokens" in spec.arrays:
        raise ValueError("npy holds maps of one size: choose fit square, the format safetensors, or no maps")
    if per_file < 1:
        raise ValueError(f"per_file must be positive, found {per_file}")
    (parts, damaged, _), weights = index_shards(shards, per_file), hashlib.sha256()
    for tensor in extractor.encoder.state_dict().values():
        weights.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # numpy has no bf16
    names = [shard.files if isinstance(shard, FolderShard) else shard.name for shard in shards]
    # Spelled as by the first version, so that folders it began can be completed.
    images = f"({names!r}, {repr(parts).replace('ShardRange', 'Part')})"
    settings = {
        "weights": weights.hexdigest(),
        "images": hashlib.sha256(images.encode(errors="surrogateescape")).hexdigest(),
        "arrays": spec.arrays,
        "block_ids": spec.block_ids,
        "norm": spec.norm,
        "half": spec.half,
        "size": spec.transform.size,
        "fit": spec.transform.fit,
        "dtype": str(extractor.runtime.dtype).removeprefix("torch."),
        "format": format,
    }
    done = FeatureStore(folder, shards, parts, settings, format).fill(extractor)
    return done._replace(errors=damaged + done.errors)


def read_features(path: str | Path, array: str = "embedding") -> dict[str, Tensor]:
    """One array of every image in a file or folder of `pixio features`.

    `torch.stack(list(read_features("features.npz").values()))` is a matrix of embeddings [N, D].

    Args:
        path: what `write_file` or `write_folder` has written.
        array: which one, such as "embedding" [D] or "patch_tokens" [h, w, D].

    Returns:
        Name of the image -> its array, in the order of the images.

    Raises:
        FileNotFoundError: no such file or folder, or one that is not complete.
        ValueError: without this array, damaged, or two images of one name, which npy folders may hold.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_named(path, array)
    found: dict[str, Tensor] = {}
    try:
        lines = (path / INDEX).read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "part" in row]
        for part, group in itertools.groupby(rows, key=lambda row: row["part"]):
            stacked, file = path / f"part_{part:06d}.{array}.npy", path / f"part_{part:06d}.safetensors"
            if stacked.exists():
                values = torch.from_numpy(np.load(stacked, allow_pickle=False))
                found |= {row["image"]: values[row["row"]] for row in group}
            elif file.exists():
                named = _read_named(file, array)
                found |= {row["image"]: named[row["image"]] for row in group}
            else:
                raise ValueError(f"{path} holds no {array}, or is not complete")
    except (json.JSONDecodeError, KeyError, IndexError, TypeError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if len(found) < len(rows):
        raise ValueError(f"{path}: {len(rows)} images have {len(found)} names, so read its files by {INDEX}")
    return found


def _read_named(path: Path, array: str) -> Arrays:
    """The arrays `NAME/array` of a file, under NAME; the others are not read."""
    from safetensors import SafetensorError, safe_open

    suffix = f"/{array}"
    try:
        with np.load(path, allow_pickle=False) if path.suffix == ".npz" else safe_open(path, "pt") as file:
            names = list(file.keys())
            read = file.get_tensor if path.suffix != ".npz" else lambda name: torch.from_numpy(file[name])
            found = {name.removesuffix(suffix): read(name) for name in names if name.endswith(suffix)}
    except (SafetensorError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not found:
        others = sorted({name.rpartition("/")[2] for name in names})
        raise ValueError(f"{path} holds no {array}, only {', '.join(others) or 'nothing'}")
    return found


class FeatureStore:
    """A folder of features of the images of some shards.

    Args:
        folder: made when missing, on a disk that all ranks see.
        shards: the images.
        parts: of the shards, from `index_shards`.
        settings: what the features are made of, for JSON; a folder with others is refused.
        layout: "safetensors", "npy" or "stacked".
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        parts: Sequence[ShardRange],
        settings: dict[str, Any],
        layout: str = "stacked",
    ):
        self.folder, self.shards, self.parts = folder, shards, parts
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as it is read back
        self.layout = layout

    def fill(self, extractor: FeatureExtractor, strict: bool = False) -> Summary:
        """Collective: compute the parts that are missing, shared out among the ranks.

        After each round of parts the ranks meet: what fails on one ends all of them with its message.

        Args:
            extractor: how they are computed.
            strict: refuse images that cannot be read instead of leaving them out.

        Returns:
            What was done, on every rank.

        Raises:
            ValueError: the folder was filled with other settings, an unreadable image (if `strict`), features
                that are not finite, two images of one name, or a disk too small.
        """
        runtime = extractor.runtime
        missing = runtime.agree(self._prepare if runtime.is_main else list)
        missing = runtime.gather(missing)[0]
        ours = missing[runtime.rank :: runtime.world_size]
        with _progress([self.parts[number] for number in ours], runtime.is_main) as bar:
            computed = extractor.run(self.shards, [self.parts[number] for number in ours], bar.update)

            def write_next(done: int) -> None:
                if done == len(ours):  # in the last round, of fewer parts than ranks
                    return
                images, arrays = next(computed)
                if strict:
                    _refuse_unreadable(images)
                if done == 0 and self.layout != "safetensors":  # else sizes differ
                    size = sum(array.nbytes for array in next(iter(arrays.values()), {}).values())
                    require_free(self.folder / INDEX, size * _count([self.parts[part] for part in missing]))
                self._write(ours[done], images, arrays)

            for done in range(-(-len(missing) // runtime.world_size)):
                runtime.agree(partial(write_next, done))
        errors = runtime.agree(partial(self._write_index, bool(missing)) if runtime.is_main else list)
        errors = runtime.gather(errors)[0]
        n_computed = _count([self.parts[number] for number in missing])
        if errors and len(errors) == _count(self.parts):
            raise ValueError(f"none of {len(errors)} images can be read, the first is {errors[0]}")
        return Summary(n_computed, _count(self.parts) - n_computed, errors)

    def array(self, name: str) -> "StoredArray":
        """One array of a filled store with stacked layout."""
        return StoredArray([self._path(number, "safetensors") for number in range(len(self.parts))], name)

    def _prepare(self) -> list[int]:
        """Compare what the folder was made with, or note it there; returns the parts that are missing."""
        path = self.folder / SETTINGS
        found = read_json(path) if path.exists() else self.settings
        if different := [name for name in self.settings if self.settings[name] != found.get(name)]:
            raise ValueError(
                f"{self.folder} holds features with other {', '.join(different)}: "
                "choose another folder, or remove this one"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder, "part_*")
        write_json(path, self.settings)
        suffixes = ("jsonl",) if self.layout == "npy" else ("jsonl", "safetensors")
        return [
            number
            for number in range(len(self.parts))
            if not all(self._path(number, suffix).exists() for suffix in suffixes)
        ]

    def _write(self, number: int, images: list[ImageRecord], arrays: dict[int, Arrays]) -> None:
        """Write the arrays of a part, and then the index that says that it is complete."""
        if self.layout == "safetensors":
            features: Arrays = {}
            _add_named(features, images, arrays)
        else:
            names = next(iter(arrays.values()), {})
            features = {name: torch.stack([found[name] for found in arrays.values()]) for name in names}
        if self.layout == "npy":
            for name, array in features.items():
                path = self._path(number, f"{name}.npy")
                write_atomic(path, partial(np.save, arr=array.numpy()))
        else:
            _write_safetensors(self._path(number, "safetensors"), features)
        rows = {place: row for row, place in enumerate(arrays)}
        lines = [
            {"image": image.name, "error": image.error}
            if image.error
            else {"image": image.name, "part": number, "row": rows[place], "size": image.size}
            for place, image in enumerate(images)
        ]
        write_text(self._path(number, "jsonl"), "".join(json.dumps(line) + "\n" for line in lines))

    def _write_index(self, changed: bool) -> list[str]:
        """Join the indices of all parts; returns a line on each image that cannot be read."""
        index = self.folder / INDEX
        if changed or not index.exists():
            texts = [self._path(number, "jsonl").read_bytes() for number in range(len(self.parts))]
            write_atomic(index, lambda file: file.writelines(texts))
        try:
            with open(index, encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines if '"error"' in line]
            return [f"{row['image']}: {row['error']}" for row in rows if "error" in row]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{index} is damaged ({type(error).__name__}: {error}): delete {self.folder}, "
                "and it is computed again"
            ) from None

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"part_{number:06d}.{suffix}"


class StoredArray:
    """One array over all images of a store, mapped from the disk: `array[rows]` reads what it returns.

    Args:
        paths: files of a stacked layout, in order.
        name: of the array in them.

    Raises:
        ValueError: a damaged file; the message names it.
    """

    def __init__(self, paths: Sequence[Path], name: str):
        from safetensors import SafetensorError, safe_open

        self._parts: list[Tensor] = []  # [images of the part, …] each
        for path in paths:
            try:
                with safe_open(path, "pt") as file:
                    if name in set(file.keys()):  # not there where no image could be read
                        self._parts.append(file.get_tensor(name))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}): delete it, and it is computed again"
                ) from error
        self._starts = [0, *itertools.accumulate(map(len, self._parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(images, …)."""
        return (len(self), *self._parts[0].shape[1:])

    def __getitem__(self, rows: slice | Sequence[int]) -> Tensor:
        """The rows of a slice without a step, or those with some numbers."""
        if not isinstance(rows, slice):
            parts = [bisect.bisect_right(self._starts, row) - 1 for row in rows]
            found = [
                self._parts[part][row - self._starts[part]] for part, row in zip(parts, rows, strict=True)
            ]
            return torch.stack(found)
        start, stop, _ = rows.indices(len(self))
        if start >= stop:
            return self._parts[0][:0]
        first, last = bisect.bisect_right(self._starts, start) - 1, bisect.bisect_left(self._starts, stop)
        pieces = zip(self._parts[first:last], self._starts[first:last], strict=True)
        return torch.cat([part[max(start - begin, 0) : stop - begin] for part, begin in pieces])


def _refuse_unreadable(images: Sequence[ImageRecord]) -> None:
    for image in images:
        if image.error:
            raise ValueError(f"{image.name} cannot be read ({image.error}): replace or remove it")


def _add_named(features: Arrays, images: Sequence[ImageRecord], arrays: dict[int, Arrays]) -> None:
    """Add to `features`, as `NAME/ARRAY`, the arrays of a part's images by their place in it.

    Raises:
        ValueError: two images of one name, of which one would be lost.
    """
    for place, found in arrays.items():
        for name, array in found.items():
            key = f"{images[place].name}/{name}"
            if key in features:
                raise ValueError(
                    f"two images are called {images[place].name}: rename one, or use a folder and npy"
                )
            features[key] = array


def _write_safetensors(path: Path, features: Arrays) -> None:
    from safetensors.torch import save

    content = save({name: array.contiguous() for name, array in features.items()})
    write_atomic(path, lambda file: file.write(content))


def _count(parts: Sequence[ShardRange]) -> int:
    """Images of some parts."""
    return sum(part.stop - part.start for part in parts)


def _progress(parts: Sequence[ShardRange], shown: bool = True) -> tqdm:
    """A bar with images per second, on a terminal; a line now and then elsewhere."""
    return tqdm(
        desc="features",
        total=_count(parts),
        unit="image",
        delay=1.0,  # seconds: what fails at once leaves only its message
        mininterval=0.1 if sys.stderr.isatty() else 30,
        disable=not (shown and parts),
    )
