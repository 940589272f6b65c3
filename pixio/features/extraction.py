"""Features of many images: found, read by worker processes, encoded in batches of one size, and stored.

The images of the sources are cut into parts; a part is done once its index file is there, so that a killed
run goes on with the parts it lacks. Batches never reach over a part: the features do not depend on how often
a run was killed, nor on the number of processes that share it.

Letters: B images of one batch, L blocks, C class tokens, h x w patches, D width.
"""

import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pixio.data.shards import FOLDER_CHUNK, IMAGE_SUFFIXES, FolderShard, Shard, TarShard
from pixio.engine.runtime import Runtime
from pixio.files import write_atomic
from pixio.images.decoding import DamagedDataError
from pixio.images.inference import Transform
from pixio.images.normalization import normalize
from pixio.models.encoder import PixioViT

ARRAYS = ("patch_tokens", "embedding", "cls_tokens", "mean_patch")
FORMATS = ("safetensors", "npy")
_INDEX, _SETTINGS = "index.jsonl", "settings.json"


# ---------------------------------------------------------------------------------------- what, from what
def find_images(sources: Sequence[str], chunk: int = FOLDER_CHUNK) -> list[Shard]:
    """List the images that files, folders, tars and patterns such as `photos/**/*.jpg` stand for.

    Args:
        sources: a folder stands for the images and tars in and below it, sorted. What is named several
            times is read once; images come before tars.
        chunk: images outside of tars that make one shard.

    Raises:
        FileNotFoundError: a source that stands for nothing.
    """
    files: dict[str, None] = {}  # in the order in which they are found
    tars: dict[str, None] = {}
    for source in sources:
        found = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
        if not found:
            raise FileNotFoundError(f"no file or folder {source}")
        inside = [file for path in map(Path, found) for file in _files(path)]
        images = [str(file) for file in inside if file.suffix.lower() in IMAGE_SUFFIXES]
        archives = [str(file) for file in inside if file.suffix == ".tar"]
        if not images and not archives:
            raise FileNotFoundError(f"no image ({', '.join(IMAGE_SUFFIXES)}) and no .tar in {source}")
        files |= dict.fromkeys(images)
        tars |= dict.fromkeys(archives)
    paths = list(files)
    chunks = ["\0".join(paths[i : i + chunk]) for i in range(0, len(paths), chunk)]
    return [FolderShard("", "", files) for files in chunks] + [TarShard(tar, tar) for tar in tars]


def _files(path: Path) -> list[Path]:
    """A file itself, or those in and below a folder, sorted; folders may be called as images are."""
    if not path.is_dir():
        return [path]
    return sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)


@dataclass(frozen=True)
class Recipe:
    """What is computed from each image.

    Attributes:
        transform: how an image becomes the encoder's input.
        arrays: some of `ARRAYS`: the map of patch tokens [h, w, D], the mean class token [D] (the recommended
            global embedding), all class tokens [C, D], and the mean patch token [D].
        block_ids: the L blocks, which then are the first axis of every array; None = the last block, and no
            such axis.
        norm: after the encoder's final norm, or as the tokens leave the block.
        half: stored as float16 instead of float32.
    """

    transform: Transform
    arrays: tuple[str, ...] = ("patch_tokens", "embedding")
    block_ids: tuple[int, ...] | None = None
    norm: bool = True
    half: bool = False

    @torch.inference_mode()
    def compute(self, encoder: PixioViT, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        """The arrays of images uint8 [B, 3, H, W], on the CPU, with B as the first axis."""
        grid = encoder.grid_of(*images.shape[-2:])
        with runtime.autocast():
            pixels = normalize(images.to(runtime.device, non_blocking=True))
            outputs = encoder(pixels, (-1,) if self.block_ids is None else self.block_ids)
        kind = "_norm" if self.norm else ""
        patches = torch.stack([output[f"patch_tokens{kind}"] for output in outputs], dim=1).float()
        tokens = torch.stack([output[f"cls_tokens{kind}"] for output in outputs], dim=1).float()
        arrays = {
            "patch_tokens": lambda: patches.unflatten(2, grid),  # [B, L, h, w, D]
            "embedding": lambda: tokens.mean(2),  # [B, L, D]
            "cls_tokens": lambda: tokens,  # [B, L, C, D]
            "mean_patch": lambda: patches.mean(2),  # [B, L, D]
        }
        found = {name: arrays[name]() for name in self.arrays}
        if self.block_ids is None:
            found = {name: array[:, 0] for name, array in found.items()}
        return {name: (array.half() if self.half else array).cpu() for name, array in found.items()}


# ------------------------------------------------------------------------------------------------- reading
class Part(NamedTuple):
    """The entries of a shard from `start` to before `stop`."""

    shard: int
    start: int
    stop: int

    def pieces(self, size: int) -> "list[Part]":
        """The part in pieces of at most `size` entries."""
        return [
            self._replace(start=i, stop=min(i + size, self.stop)) for i in range(self.start, self.stop, size)
        ]


def cut(shards: Sequence[Shard], size: int) -> list[Part]:
    """The parts of all shards, of at most `size` images each; tars are indexed for it.

    Raises:
        ValueError: a tar that cannot be read.
    """
    parts = []
    for number, shard in enumerate(shards):
        try:
            with shard.open(0) as source:
                parts += Part(number, 0, len(source.entries)).pieces(size)
        except DamagedDataError as error:
            raise DamagedDataError(f"{shard.name}: {error}") from error
    return parts


class Image(NamedTuple):
    """An image that was read: its name, its size (height, width) in pixels, or why it cannot be read."""

    name: str
    size: tuple[int, int] | None
    error: str | None = None


class _Read(NamedTuple):
    """What a worker process made of a piece of a part."""

    images: list[Image]
    batches: list[tuple[list[int], Tensor]]  # entries of one input size, and their uint8 [B, 3, H, W]


class _Pieces(Dataset):
    """Reads pieces of parts; each process keeps the shard open that it reads."""

    def __init__(self, shards: Sequence[Shard], pieces: Sequence[Part], transform: Transform):
        self.shards, self.pieces, self.transform = shards, pieces, transform
        self._opened: int | None = None
        self._stack = ExitStack()

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> _Read:
        shard, start, stop = self.pieces[number]
        if self._opened != shard:
            self._stack.close()
            self._source = self._stack.enter_context(self.shards[shard].open(0))
            self._opened = shard
        prefix = self.shards[shard].name and f"{self.shards[shard].name}/"
        images: list[Image] = []
        groups: dict[tuple[int, int], tuple[list[int], list[Tensor]]] = {}
        for place, entry in enumerate(self._source.entries[start:stop], start):
            name = f"{prefix}{entry.key}"
            try:
                pixels, placement = self.transform.pixels(self._source.read(entry))
            except (DamagedDataError, OSError) as error:
                images.append(Image(name, None, str(error)))
                continue
            images.append(Image(name, placement.original))
            numbers, group = groups.setdefault(placement.padded, ([], []))
            numbers.append(place)
            group.append(pixels)
        return _Read(images, [(numbers, torch.stack(group)) for numbers, group in groups.values()])


class Extractor:
    """Encodes parts of shards one after another.

    Args:
        encoder: in evaluation mode, on the device of `runtime`.
        recipe: what is computed.
        runtime: device and precision.
        batch_size: images per batch at most; all images of a batch have the same input size.
        workers: processes that read; 0 reads in this one.
    """

    def __init__(
        self, encoder: PixioViT, recipe: Recipe, runtime: Runtime, batch_size: int = 32, workers: int = 0
    ):
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size {batch_size} must be positive, workers {workers} not negative")
        self.encoder, self.recipe, self.runtime = encoder, recipe, runtime
        self.batch_size, self.workers = batch_size, workers

    def run(
        self, shards: Sequence[Shard], parts: Sequence[Part]
    ) -> Iterator[tuple[list[Image], dict[int, dict[str, Tensor]]]]:
        """For each part its images, and by their place in it the arrays of those that could be read.

        Raises:
            ValueError: features that are not finite; the message names the image.
        """
        pieces = [part.pieces(self.batch_size) for part in parts]
        loader = DataLoader(
            _Pieces(shards, [piece for some in pieces for piece in some], self.recipe.transform),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.runtime.pins_memory,
        )
        read = iter(loader)
        for part, some in zip(parts, pieces, strict=True):
            images: list[Image] = []
            arrays: dict[int, dict[str, Tensor]] = {}
            waiting: dict[torch.Size, tuple[list[int], Tensor]] = {}
            for _ in some:
                found = next(read)
                images += found.images
                for numbers, pixels in found.batches:
                    size = pixels.shape[2:]
                    if size in waiting:
                        held = waiting.pop(size)
                        numbers, pixels = held[0] + numbers, torch.cat([held[1], pixels])
                    whole = len(numbers) // self.batch_size * self.batch_size
                    arrays |= self._encode(numbers[:whole], pixels[:whole])
                    if numbers[whole:]:
                        waiting[size] = numbers[whole:], pixels[whole:]
            for numbers, pixels in waiting.values():
                arrays |= self._encode(numbers, pixels)
            arrays = {number - part.start: found for number, found in sorted(arrays.items())}
            for number, found in arrays.items():
                if not all(array.isfinite().all() for array in found.values()):
                    remedy = "store float32" if self.recipe.half else "compute in fp32"
                    raise ValueError(f"the features of {images[number].name} are not finite: {remedy}")
            yield images, arrays

    def _encode(self, numbers: list[int], pixels: Tensor) -> dict[int, dict[str, Tensor]]:
        """Arrays of each of some images of one size, uint8 [n, 3, H, W], under their numbers."""
        found = {}
        for i in range(0, len(numbers), self.batch_size):
            batch = self.recipe.compute(self.encoder, pixels[i : i + self.batch_size], self.runtime)
            for row, number in enumerate(numbers[i : i + self.batch_size]):
                found[number] = {name: array[row] for name, array in batch.items()}
        return found


# ------------------------------------------------------------------------------------------------- storing
class Summary(NamedTuple):
    """Images whose features were computed now and earlier, and messages about those that cannot be read."""

    computed: int
    earlier: int
    errors: list[str]


def write_file(path: Path, extractor: Extractor, shards: Sequence[Shard]) -> Summary:
    """Write the features of a few images into one file, as `NAME/ARRAY`.

    Args:
        path: ends in .npz or .safetensors.
        extractor: how they are computed.
        shards: the images.

    Raises:
        ValueError: an image that cannot be read; two of one name (in a tar); see also `Extractor.run`.
    """
    parts, features = cut(shards, FOLDER_CHUNK), {}
    with _progress(parts, "features") as bar:
        for images, arrays in extractor.run(shards, parts):
            for image in images:
                if image.error:
                    raise ValueError(f"{image.name}: {image.error}")
            _add_named(features, images, arrays)
            bar.update(len(images))
    if path.suffix == ".npz":
        content = {name: array.numpy() for name, array in features.items()}
        write_atomic(path, lambda file: np.savez(file, **content))
    else:
        write_atomic(path, lambda file: file.write(_to_safetensors(features)))
    return Summary(sum(part.stop - part.start for part in parts), 0, [])


def write_folder(
    folder: Path,
    extractor: Extractor,
    shards: Sequence[Shard],
    format: str = "safetensors",
    per_file: int = FOLDER_CHUNK,
) -> Summary:
    """Collective: write features into a folder, part by part; what a killed run completed is kept.

    `part_000000.safetensors` holds an array under each `NAME/ARRAY`; `part_000000.ARRAY.npy` holds one array
    with the images of the part as its first axis. A line of `index.jsonl` is an object with `image`, and
    either `part`, `row` (within the part) and `size` ([height, width] in pixels), or `error`.

    Args:
        folder: made when missing.
        extractor: how they are computed.
        shards: the images.
        format: one of `FORMATS`; `npy` needs maps of one size.
        per_file: images of a part, at most; see also `find_images`.

    Raises:
        ValueError: the folder holds features of other images or settings; two images of one name
            in one file of safetensors; see also `Extractor.run`.
    """
    runtime, recipe = extractor.runtime, extractor.recipe
    if format not in FORMATS:
        raise ValueError(f"unknown format '{format}': choose one of {', '.join(FORMATS)}")
    if format == "npy" and recipe.transform.fit != "square" and "patch_tokens" in recipe.arrays:
        raise ValueError("npy holds maps of one size: choose fit square, the format safetensors, or no maps")
    if per_file < 1:
        raise ValueError(f"per_file must be positive, found {per_file}")
    parts = cut(shards, per_file)
    _settle(folder, extractor, shards, parts, format)
    missing = [number for number, _ in enumerate(parts) if not _marker(folder, number).exists()]
    ours = missing[runtime.rank :: runtime.world_size]
    with _progress([parts[number] for number in ours], "features", runtime.is_main) as bar:
        computed = extractor.run(shards, [parts[number] for number in ours])
        for number, (images, arrays) in zip(ours, computed, strict=True):
            _write_part(folder, number, images, arrays, format)
            bar.update(len(images))
    runtime.barrier()
    lines = [
        line for number in range(len(parts)) for line in _marker(folder, number).read_bytes().splitlines()
    ]
    if runtime.is_main:
        write_atomic(folder / _INDEX, lambda file: file.writelines(line + b"\n" for line in lines))
    rows = map(json.loads, lines)
    errors = [f"{row['image']}: {row['error']}" for row in rows if "error" in row]
    computed = sum(parts[number].stop - parts[number].start for number in missing)
    return Summary(computed, len(lines) - computed, errors)


def _settle(
    folder: Path, extractor: Extractor, shards: Sequence[Shard], parts: Sequence[Part], format: str
) -> None:
    """Compare what the folder was made with, or note it there."""
    recipe, weights = extractor.recipe, hashlib.sha256()
    for tensor in extractor.encoder.state_dict().values():
        weights.update(tensor.cpu().contiguous().numpy())
    names = [shard.files if isinstance(shard, FolderShard) else shard.name for shard in shards]
    images = hashlib.sha256(repr((names, parts)).encode(errors="surrogateescape"))
    settings: dict[str, Any] = {
        "weights": weights.hexdigest(),
        "images": images.hexdigest(),
        "arrays": list(recipe.arrays),
        "block_ids": recipe.block_ids and list(recipe.block_ids),
        "norm": recipe.norm,
        "half": recipe.half,
        "size": recipe.transform.size,
        "fit": recipe.transform.fit,
        "dtype": str(extractor.runtime.dtype).removeprefix("torch."),
        "format": format,
    }
    path = folder / _SETTINGS
    found = json.loads(path.read_text()) if path.exists() else settings
    extractor.runtime.barrier()  # all have looked before one writes
    different = [name for name in settings if settings[name] != found.get(name)]
    if different:
        raise ValueError(
            f"{folder} holds features with other {', '.join(different)}: use another --output, or remove it"
        )
    if extractor.runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".part_*.tmp"):  # of a process killed while writing
            leftover.unlink()
        write_atomic(path, lambda file: file.write(json.dumps(settings, indent=2).encode()))
    extractor.runtime.barrier()


def _write_part(
    folder: Path, number: int, images: list[Image], arrays: dict[int, dict[str, Tensor]], format: str
) -> None:
    """Write the arrays of a part, and then the index that says that it is done."""
    stem, rows = f"part_{number:06d}", {place: row for row, place in enumerate(arrays)}
    if format == "safetensors":
        features: dict[str, Tensor] = {}
        _add_named(features, images, arrays)
        write_atomic(folder / f"{stem}.safetensors", lambda file: file.write(_to_safetensors(features)))
    else:
        for name in next(iter(arrays.values()), ()):
            stacked = np.stack([found[name].numpy() for found in arrays.values()])
            write_atomic(folder / f"{stem}.{name}.npy", lambda file, stacked=stacked: np.save(file, stacked))
    lines = [
        {"image": image.name, "error": image.error}
        if image.error
        else {"image": image.name, "part": number, "row": rows[place], "size": image.size}
        for place, image in enumerate(images)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomic(_marker(folder, number), lambda file: file.write(text.encode()))


def _add_named(
    features: dict[str, Tensor], images: Sequence[Image], arrays: dict[int, dict[str, Tensor]]
) -> None:
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


def _marker(folder: Path, number: int) -> Path:
    """The index of a part; where it is, the part is complete."""
    return folder / f"part_{number:06d}.jsonl"


def _to_safetensors(features: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: array.contiguous() for name, array in features.items()})


def _progress(parts: Sequence[Part], title: str, shown: bool = True) -> tqdm:
    """A bar with images per second, on a terminal; a line now and then elsewhere."""
    return tqdm(
        desc=title,
        total=sum(part.stop - part.start for part in parts),
        unit="image",
        delay=1.0,  # seconds: what fails at once leaves only its message
        mininterval=0.1 if sys.stderr.isatty() else 30,
        disable=not (shown and parts),
    )
