"""Features of a folder of images, extracted once and kept on disk, by any number of ranks.

A split is cut into parts of 512 images; a part is a file that is whole or absent, so that a killed run goes
on with the parts it lacks. Batches never reach over a part: the same images meet in a batch on any number of
ranks.

Letters: n images, L blocks, D width, S side of a crop, B batch.
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pixio.engine.runtime import Runtime
from pixio.files import write_atomic
from pixio.images.crops import resize_center_crop
from pixio.images.decoding import DamagedDataError, decode
from pixio.images.listing import IMAGE_SUFFIXES
from pixio.images.normalization import normalize

PART = 512  # images


@dataclass(frozen=True)
class Split:
    """The images of one split, class by class.

    Attributes:
        root: folder with a folder for each class.
        files: relative paths, encoded as the system does, sorted.
        labels: int64 [n], number of each image's class.
        classes: names of the classes.
    """

    root: Path
    files: np.ndarray
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, number: int) -> Path:
        """Where an image lies."""
        return self.root / os.fsdecode(self.files[number])


def list_split(root: Path, classes: list[str] | None = None) -> Split:
    """List the images `CLASS/*` below a folder; hidden files are left out.

    Args:
        root: the folder of the split.
        classes: names of the classes, in order; None: those that have images here.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: a class that is not among `classes`.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root.absolute()}: expected {root.name}/CLASS/IMAGE in --data_path"
        )
    found = {
        folder.name: sorted(
            f"{folder.name}/{file.name}"
            for file in os.scandir(folder)
            if file.name.lower().endswith(IMAGE_SUFFIXES) and not file.name.startswith(".") and file.is_file()
        )
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise FileNotFoundError(
            f"no image ({', '.join(IMAGE_SUFFIXES)}) in the class folders of {root.absolute()}"
        )
    classes = list(found) if classes is None else classes
    if foreign := sorted(found.keys() - set(classes)):
        raise ValueError(f"{root.absolute()} has classes without training images: {', '.join(foreign[:4])}")
    numbers = {name: number for number, name in enumerate(classes)}
    # One array of bytes instead of a million objects, which every loading process would copy.
    files = np.array([os.fsencode(file) for files in found.values() for file in files])
    labels = torch.tensor([numbers[name] for name, files in found.items() for _ in files])
    return Split(root, files, labels, classes)


@dataclass(frozen=True)
class Features:
    """Files with the L2-normalized features of a split.

    They are kept in half precision, 11 significant bits: as many as TF32 products would look at anyway.

    Attributes:
        folder: holds `part_00000.npy`, …, each float16 [L, images, D].
        split: the images.
        blocks: L.
        width: D.
    """

    folder: Path
    split: Split
    blocks: int
    width: int

    def missing(self) -> list[int]:
        """Numbers of the parts that are still to be made."""
        return [part for part in range(-(-len(self.split) // PART)) if not self._path(part).exists()]

    def images(self, part: int) -> range:
        """Numbers of the images of a part."""
        return range(part * PART, min((part + 1) * PART, len(self.split)))

    def write(self, part: int, features: Tensor) -> None:
        """Keep the features of a part, float16 [L, images, D]."""
        write_atomic(self._path(part), lambda file: np.save(file, features.numpy()))

    def read(self, block: int, start: int, stop: int) -> Tensor:
        """Features after a block of the images from `start` to before `stop`, float16 [n, D].

        Raises:
            ValueError: a file is not as it was written; the message names it.
        """
        pieces = []
        for part in range(start // PART, -(-stop // PART)):
            images, path = self.images(part), self._path(part)
            shape = (self.blocks, len(images), self.width)
            try:
                features = np.load(path, mmap_mode="r")
            except (ValueError, EOFError) as error:
                raise ValueError(f"{path} is damaged ({error}): delete it") from error
            if features.shape != shape or features.dtype != np.float16:
                raise ValueError(f"{path} holds {features.dtype} {features.shape}, not {shape}: delete it")
            pieces.append(features[block, max(start - images.start, 0) : stop - images.start])
        return torch.from_numpy(np.concatenate(pieces))

    def _path(self, part: int) -> Path:
        return self.folder / f"part_{part:05d}.npy"


@dataclass(frozen=True)
class Extractor:
    """How images become features: one global embedding after each of some blocks, before the final norm.

    Attributes:
        encoder: on the device of `runtime`, in evaluation mode.
        identity: text that tells encoders apart.
        runtime: of this rank.
        block_ids: the L blocks.
        pool: "cls", the mean of the class (and register) tokens; "first", the first of them; "patch", the
            mean of the patch tokens.
        resize: shorter side after resizing, in pixels.
        crop: side S of the central square that is seen.
        batch_size: B; more than PART changes nothing.
        num_workers: loading processes of this rank.
    """

    encoder: nn.Module
    identity: str
    runtime: Runtime
    block_ids: tuple[int, ...]
    pool: str
    resize: int
    crop: int
    batch_size: int
    num_workers: int

    def run(self, split: Split, folder: Path) -> Features:
        """Collective: all features of a split; those already in `folder` are used, the others shared out.

        Args:
            split: images.
            folder: holds the features of all splits and encoders, each in a folder of its own, which is
                found again only for the same settings and images: same path, size and time of change.

        Raises:
            ValueError: an unreadable image, or features that are not finite; the message names the file.
        """
        runtime = self.runtime
        place = runtime.gather(self._place(split, folder) if runtime.is_main else None)[0]
        features = Features(place, split, len(self.block_ids), self.encoder.embed_dim)
        missing = runtime.gather(features.missing() if runtime.is_main else None)[0]
        self._fill(features, missing[runtime.rank :: runtime.world_size])
        runtime.barrier()
        return features

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """L2-normalized embeddings of images uint8 [B, 3, S, S]: float32 [L, B, D], on the device."""
        with self.runtime.autocast():
            images = normalize(images.to(self.runtime.device, non_blocking=True))
            outputs = self.encoder(images, self.block_ids)
        if self.pool == "first":
            vectors = [output["cls_tokens"][:, 0].float() for output in outputs]
        else:
            vectors = [output[f"{self.pool}_tokens"].float().mean(1) for output in outputs]
        return F.normalize(torch.stack(vectors), dim=2)  # [L, B, D]

    def _place(self, split: Split, folder: Path) -> Path:
        settings = (self.identity, str(self.runtime.dtype), self.block_ids, self.pool, self.resize, self.crop)
        digest = hashlib.sha256(repr(settings).encode())
        for file in split.files.tolist():
            status = os.stat(os.path.join(os.fsencode(split.root), file))
            digest.update(b"%s\0%d %d\n" % (file, status.st_size, status.st_mtime_ns))
        place = folder / f"{split.root.name}_{digest.hexdigest()[:16]}"
        place.mkdir(parents=True, exist_ok=True)
        for leftover in place.glob(".part_*.tmp"):  # of a process killed while writing
            leftover.unlink()
        return place

    def _fill(self, features: Features, parts: list[int]) -> None:
        if not parts:  # no worker needs to be started
            return
        split, size = features.split, self.batch_size
        images = {part: features.images(part) for part in parts}
        batches = {
            part: [list(numbers[i : i + size]) for i in range(0, len(numbers), size)]
            for part, numbers in images.items()
        }
        loader = DataLoader(
            _Crops(split, self.resize, self.crop),
            batch_sampler=[batch for part in batches.values() for batch in part],
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=self.runtime.pins_memory,
        )
        loaded = iter(loader)
        bar = tqdm(
            desc=f"features of {split.root.name}, rank 0",
            total=sum(map(len, images.values())),
            unit="image",
            mininterval=0.1 if sys.stderr.isatty() else 30,
            disable=not self.runtime.is_main,
        )
        for part in parts:
            vectors = []
            for numbers in batches[part]:
                crops = next(loaded)
                if isinstance(crops, str):
                    raise ValueError(crops)
                vectors.append(self.embed(crops).half().cpu())  # [L, B, D]
                finite = vectors[-1].isfinite().all(2).all(0)
                if not finite.all():
                    path = split.path(numbers[int(finite.int().argmin())])
                    raise ValueError(f"the features of {path} are not finite: try --dtype fp32")
                bar.update(len(numbers))
            features.write(part, torch.cat(vectors, dim=1))
        bar.close()


class _Crops(Dataset):
    """Crops uint8 [3, S, S]; text where an image cannot be read."""

    def __init__(self, split: Split, resize: int, crop: int):
        self.split, self.resize, self.crop = split, resize, crop

    def __getitem__(self, number: int) -> Tensor | str:
        path = self.split.path(number)
        try:
            return resize_center_crop(decode(path.read_bytes()), self.resize, self.crop)
        except (DamagedDataError, OSError) as error:
            return f"{path} cannot be read ({error}): replace or remove it"


def _collate(items: list[Tensor | str]) -> Tensor | str:
    return next((item for item in items if isinstance(item, str)), None) or torch.stack(items)
