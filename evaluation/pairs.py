"""Images with dense targets: which files belong together, how they are read, cropped, and dealt to the ranks.

Letters: H x W pixels, S side of a crop, B crops of a rank and step.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixio.images.decoding import MAX_PIXELS, DamagedDataError, decode
from pixio.images.listing import IMAGE_SUFFIXES


class Pair(NamedTuple):
    """An image and its target (depth or mask), as paths relative to the root of the data."""

    image: str
    target: str


class Listing(NamedTuple):
    """The pairs of a split, and the files that its rule expects but the disk lacks."""

    pairs: list[Pair]
    missing: list[str]


# ---------------------------------------------------------------------------------------------------- listing


def list_existing(root: Path, expected: Iterable[Pair]) -> Listing:
    """Those of the expected pairs of which both files exist; each folder is listed once."""
    folders: dict[str, set[str]] = {}

    def exists(path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in folders:
            place = root / folder
            folders[folder] = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
        return name in folders[folder]

    pairs, missing = [], []
    for pair in expected:
        absent = [path for path in pair if not exists(path)]
        missing += absent
        if not absent:
            pairs.append(pair)
    return Listing(pairs, missing)


def find(root: Path, pattern: str, suffixes: tuple[str, ...] | None = None) -> list[str]:
    """Files that match a glob pattern, as sorted relative paths, nothing hidden among them."""
    found = (path.relative_to(root) for path in root.glob(pattern))
    return sorted(
        path.as_posix()
        for path in found
        if not any(part.startswith(".") for part in path.parts)
        and (suffixes is None or path.suffix.lower() in suffixes)
    )


def list_folder(root: Path, split: str, targets: str, suffixes: tuple[str, ...]) -> Listing:
    """A user's own tree: `SPLIT/images/NAME.jpg` with `SPLIT/TARGETS/NAME.png`, in subfolders too.

    Args:
        root: of the data.
        split: "train" or "val".
        targets: name of the folder with depth or masks.
        suffixes: of target files; the first that exists is taken.
    """
    found = find(root, f"{split}/{targets}/**/*", suffixes)
    found.sort(key=lambda path: suffixes.index(Path(path).suffix.lower()), reverse=True)  # the first one wins
    by_stem = {path[: path.rindex(".")].removeprefix(f"{split}/{targets}/"): path for path in found}
    pairs, missing = [], []
    for image in find(root, f"{split}/images/**/*", IMAGE_SUFFIXES):
        stem = image[: image.rindex(".")].removeprefix(f"{split}/images/")
        if stem in by_stem:
            pairs.append(Pair(image, by_stem[stem]))
        else:
            missing.append(f"{split}/{targets}/{stem}{suffixes[0]}")
    return Listing(pairs, missing)


def read_split_file(root: Path, file: Path) -> Listing:
    """A list of pairs that overrides a rule: `IMAGE TARGET` per line, relative to the root of the data.

    Raises:
        FileNotFoundError: no such list, or a file in it does not exist.
        ValueError: a line that is not two paths.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no split file at {file}")
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) != 2:
            raise ValueError(
                f"{file}, line {number}: expected an image and its target, separated by a blank (a tab where "
                f"names hold blanks), found {line[:80]!r}"
            )
        pairs.append(Pair(*fields))
    listing = list_existing(root, pairs)
    if listing.missing:
        raise FileNotFoundError(
            f"{file} names {len(listing.missing)} files that {root} lacks, such as {listing.missing[0]}"
        )
    return listing


def list_pairs(
    root: str,
    split: str,
    split_file: str | None,
    rule: Callable[[Path, str], Listing],
    expected: int | None,
) -> tuple[list[Pair], str]:
    """The pairs of a split, counted.

    Args:
        root: folder of the data.
        split: "train" or "val".
        split_file: overrides the rule and the count.
        rule: lists the pairs below a root.
        expected: published number of pairs; None where nothing is published.

    Returns:
        The pairs, and a complaint, empty if their number is the published one.

    Raises:
        FileNotFoundError: no such folder or split file, or nothing in it.
        ValueError: an unreadable split file.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"no data in {folder.absolute()}: there is no such folder; set --data_root")
    pairs, missing = read_split_file(folder, Path(split_file)) if split_file else rule(folder, split)
    lacking = ""
    if missing:
        named = ", ".join(missing[:3])
        lacking = f"; missing {named}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if not pairs and split_file:
        raise FileNotFoundError(f"{split_file} names no {split} pairs")
    if not pairs:
        raise FileNotFoundError(f"{folder} holds no {split} pairs{lacking}; see the README for its layout")
    if expected is None or split_file or len(pairs) == expected:
        return pairs, ""
    return pairs, f"{folder} holds {len(pairs)} {split} pairs, the published split {expected}{lacking}"


# ---------------------------------------------------------------------------------------------------- reading


class Item(NamedTuple):
    """One image with its target; a batch of crops has a leading dimension B in both tensors."""

    names: list[str]  # of the image files, for messages
    image: Tensor  # uint8 [3, H, W]
    target: Tensor  # [H, W], depth float32 in metres or class uint8


def read_image(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], the pixels where they are stored, over their targets, whatever EXIF says.

    Raises:
        DamagedDataError: unreadable; the message names the file.
    """
    try:
        return np.array(decode(path.read_bytes(), upright=False))
    except DamagedDataError as error:
        raise DamagedDataError(f"{path} is not a readable image: {error}") from error


def read_png(path: Path, modes: tuple[str, ...], what: str) -> np.ndarray:
    """The values of a PNG as stored: [H, W].

    Args:
        path: PNG file.
        modes: Pillow's names of the pixel formats allowed.
        what: these formats in words, for messages.

    Raises:
        DamagedDataError: unreadable, or of another pixel format.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} is above {MAX_PIXELS} pixels")
            if image.mode not in modes:
                raise ValueError(f"its pixel format is {image.mode}, expected {what}")
            return np.array(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        raise DamagedDataError(f"{path} is not usable: {error}") from error


def crop_and_flip(
    rng: np.random.Generator, image: np.ndarray, target: np.ndarray, size: int, fill: float
) -> tuple[np.ndarray, np.ndarray]:
    """A random square of image and target, mirrored half of the time.

    Smaller images are padded on the right and below: with 0 (black), the target with `fill` (not scored).

    Args:
        rng: source of randomness.
        image: uint8 [H, W, 3].
        target: [H, W].
        size: S in pixels.
        fill: value of padded target pixels.

    Returns:
        uint8 [S, S, 3] and [S, S].
    """
    height, width = target.shape
    below, right = max(size - height, 0), max(size - width, 0)
    if below or right:
        image = np.pad(image, ((0, below), (0, right), (0, 0)))
        target = np.pad(target, ((0, below), (0, right)), constant_values=fill)
    top = rng.integers(target.shape[0] - size + 1)
    left = rng.integers(target.shape[1] - size + 1)
    image, target = (array[top : top + size, left : left + size] for array in (image, target))
    if rng.random() < 0.5:
        image, target = image[:, ::-1], target[:, ::-1]
    return image, target


Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Pairs(Dataset):
    """The items of a split. What cannot be read is returned as the exception: `unwrap` raises it outside
    of the worker process, without its traceback.

    Args:
        root: folder the pairs are relative to.
        pairs: the files.
        read: image path, target path -> image uint8 [H, W, 3], target [H, W].
        complaint: what is wrong with their number, or nothing.
        augment: random generator, image, target -> crops; None leaves items whole.
    """

    root: Path
    pairs: list[Pair]
    complaint: str
    read: Callable[[Path, Path], Arrays]
    augment: Callable[[np.random.Generator, np.ndarray, np.ndarray], Arrays] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, ...]) -> Item | Exception:
        """Item `key[0]`; what follows in `key` seeds the augmentation."""
        index, *entropy = key
        image_path, target_path = (self.root / path for path in self.pairs[index])
        try:
            image, target = self.read(image_path, target_path)
            if image.shape[:2] != target.shape:
                raise ValueError(
                    f"{target_path} has {target.shape[0]} x {target.shape[1]} pixels, but its image "
                    f"{image_path} {image.shape[0]} x {image.shape[1]}: both must be the same"
                )
        except (ValueError, OSError) as error:
            return error
        if self.augment:
            image, target = self.augment(np.random.default_rng(entropy), image, target)
        image, target = np.ascontiguousarray(image), np.ascontiguousarray(target)
        return Item([str(image_path)], torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(target))


# ---------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Order:
    """Which items make up which step: a new permutation per epoch, the same steps for any number of ranks.

    The last, incomplete step of an epoch is dropped; a data set smaller than one step is repeated.

    Args:
        items: number of items.
        per_step: items of a step, over all ranks.
        seed: of permutations and augmentation.
    """

    items: int
    per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return max(self.items // self.per_step, 1)

    def keys(self, start: int, stop: int, rank: int, world_size: int) -> Iterator[list[tuple[int, ...]]]:
        """For each step from `start` on, a rank's keys into `Pairs`: the item, then what seeds its crop."""
        share = self.per_step // world_size
        order, ordered = None, -1
        for step in range(start, stop):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != ordered:
                order, ordered = self._permutation(epoch), epoch
            first = step_of_epoch * self.per_step + rank * share
            # counted from 1: a final 0 would seed as the permutation is seeded
            yield [(int(order[i]), self.seed, epoch, i + 1) for i in range(first, first + share)]

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        rounds = -(-self.per_step // self.items)  # 1 unless the data set is smaller than a step
        return np.concatenate([rng.permutation(self.items) for _ in range(rounds)])


def unwrap(item: Item | Exception) -> Item:
    """The item, or the reason why there is none, raised."""
    if isinstance(item, Exception):
        raise item
    return item


def train_batches(
    pairs: Pairs, keys: Iterator[list[tuple[int, ...]]], num_workers: int, pin_memory: bool
) -> Iterator[Item]:
    """Batches of crops: names, uint8 [B, 3, S, S], targets [B, S, S]."""
    loader = DataLoader(
        pairs, batch_sampler=keys, num_workers=num_workers, pin_memory=pin_memory, collate_fn=_collate
    )
    return map(unwrap, loader)


def whole_items(
    pairs: Pairs, indices: Iterable[int], num_workers: int, pin_memory: bool
) -> Iterator[tuple[int, Item]]:
    """Items with their indices, one by one and uncropped."""
    keys = [(index,) for index in indices]
    loader = DataLoader(
        pairs,
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
    )
    return ((index, unwrap(item)) for (index,), item in zip(keys, loader, strict=True))


def _collate(items: list[Item | Exception]) -> Item | Exception:
    for item in items:
        if isinstance(item, Exception):
            return item
    names, images, targets = zip(*items, strict=True)
    return Item([name for (name,) in names], torch.stack(images), torch.stack(targets))


def _as_it_is(item: Item | Exception) -> Item | Exception:
    return item
