"""Which image belongs to which target (depth or mask): published splits, a user's folders, split files."""

import codecs
import errno
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from pixio.images.listing import IMAGE_SUFFIXES, list_files


class Pair(NamedTuple):
    """An image and its target, as paths relative to the root of the data."""

    image: str
    target: str


class Listing(NamedTuple):
    """The pairs of a split, and the files that its rule expects but the disk lacks."""

    pairs: list[Pair]
    missing: list[str]


def finder(root: Path) -> Callable[[str], bool]:
    """Whether a path exists below `root` (or anywhere, if absolute); each folder is listed once."""

    @functools.cache
    def names(folder: str) -> set[str]:
        place = root / folder
        try:
            return {entry.name for entry in place.iterdir()} if place.is_dir() else set()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return set()

    return lambda path: path.rpartition("/")[2] in names(path.rpartition("/")[0])


def list_existing(root: Path, expected: Iterable[Pair]) -> Listing:
    """Those of the expected pairs of which both files exist."""
    exists, pairs, missing = finder(root), [], []
    for pair in expected:
        absent = [path for path in pair if not exists(path)]
        missing += absent
        if not absent:
            pairs.append(pair)
    return Listing(pairs, missing)


def list_below(root: Path, folder: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """Files with one of the suffixes in a folder and below it, as sorted paths relative to `root`."""
    place = root / folder
    return [f"{folder}/{name}" for name in list_files(place, suffixes)] if place.is_dir() else []


def list_folder(root: Path, split: str, targets: str, suffixes: tuple[str, ...]) -> Listing:
    """A user's own tree: `SPLIT/images/NAME.jpg` with `SPLIT/TARGETS/NAME.png`, in subfolders too.

    Args:
        root: of the data.
        split: "train" or "val".
        targets: name of the folder with depth or masks.
        suffixes: of target files; the first that exists is taken.
    """

    def stem(path: str, folder: str) -> str:
        return path[: path.rindex(".")].removeprefix(f"{split}/{folder}/")

    found = list_below(root, f"{split}/{targets}", suffixes)
    found.sort(key=lambda path: suffixes.index(Path(path).suffix.lower()), reverse=True)  # the first one wins
    by_stem = {stem(path, targets): path for path in found}
    images = {path: stem(path, "images") for path in list_below(root, f"{split}/images")}
    return Listing(
        [Pair(path, by_stem[name]) for path, name in images.items() if name in by_stem],
        [f"{split}/{targets}/{name}{suffixes[0]}" for name in images.values() if name not in by_stem],
    )


def read_split_file(root: Path, file: Path, folders: tuple[str, ...] = ()) -> list[Pair]:
    """Read a list of pairs that overrides a rule: `IMAGE TARGET` per line, relative to the root of the data.

    The lists of BTS (https://github.com/cleinc/bts) are read too: a leading slash is dropped, a third column
    (the focal length) is ignored, and so are lines whose target is `None`.

    Args:
        root: folder of the data.
        file: text in UTF-8 or UTF-16, with or without a byte-order mark.
        folders: where below the root, beside itself, paths may start.

    Raises:
        FileNotFoundError: no such list, or a file in it does not exist.
        ValueError: a line that is not two paths, or damaged UTF-16.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no split file at {file.absolute()}")
    data, exists, pairs, missing = file.read_bytes(), finder(root), [], []
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16") if utf16 else data.decode("utf-8-sig", errors="surrogateescape")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} begins as UTF-16, but is not: {error}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) == 3 and re.fullmatch(r"\d+(\.\d+)?", fields[2].strip()):
            fields.pop()
        if len(fields) != 2:
            raise ValueError(
                f"{file}, line {number}: expected an image and its target, separated by a blank (a tab where "
                f"names hold blanks), found {line[:80]!r}"
            )
        if fields[1] == "None":
            continue
        found = []
        for path in fields:
            places = [folder + path.lstrip("/") for folder in ("", *folders)] + [path]
            place = next(filter(exists, places), None)
            (missing if place is None else found).append(path if place is None else place)
        if len(found) == 2:
            pairs.append(Pair(*found))
    if missing:
        found = f"{len(missing)} files that {root.absolute()} lacks, such as {missing[0]}"
        raise FileNotFoundError(f"{file.absolute()} names {found}")
    return pairs
