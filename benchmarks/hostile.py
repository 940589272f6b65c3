"""Readers of foreign bytes and seeds for each, which `faults.py hostile` damages.

A seed is a folder, {name: bytes}; its first file is damaged, half of the time inside of its format (checksums
and lengths are made right again, so that the damage reaches the code behind them). Some seeds are attacks
that no chance would find: pickles that run code, archives and references that unfold to terabytes.
"""

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import weight_seeds
from damage import LINES, PNG, SAFETENSORS, TAR, ZIP, Format, chunks, damage, header, join_chunks
from dense.listing import read_split_file
from PIL import Image
from weight_seeds import ALONE, Bomb, Seed

import pixio
from pixio.cli.curves import save_curves
from pixio.cli.report import write_report
from pixio.data.curation import Curation, has_scores, read_statistics, write_statistics
from pixio.data.tar_index import index_tar, read_member
from pixio.dense.head_file import read_head
from pixio.engine.config import option, parse
from pixio.engine.logger import Log
from pixio.features.extraction import ShardRange
from pixio.features.store import FeatureStore
from pixio.images import jpeg, png
from pixio.images.decoding import DamagedDataError, decode, read_size, read_turn
from pixio.images.rasters import open_image
from pixio.images.targets import open_depth, open_mask


@dataclass(frozen=True)
class Reader:
    """Code that takes bytes which may be anybody's.

    Attributes:
        read: given the folder of a seed.
        seeds: makes what is damaged, and attacks.
        refuses: the exceptions that it documents.
        format: of the file that is damaged.
        slow: takes more than a few milliseconds.
        memory: bytes of address space that it may ask for beyond what the process had.
    """

    read: Callable[[Path], Any]
    seeds: Callable[[], list[Seed]]
    refuses: tuple[type[BaseException], ...] = (ValueError,)
    format: Format | None = None
    slow: bool = False
    memory: int = 1 << 30


def damaged(reader: Reader, seeds: list[Seed], number: int, salt: str) -> Seed:
    """Input `number` of a reader: always the same; the first ones are the seeds."""
    if number < len(seeds):
        return seeds[number]
    rng = random.Random(f"{salt} {number}")
    seed = rng.choice(seeds)
    name = next(iter(seed))
    other = rng.choice(seeds)
    return seed | {name: damage(seed[name], reader.format, rng, next(iter(other.values())))}


# ---------------------------------------------------------------------------------------------- weights
def _read_head(folder: Path) -> None:
    read_head(folder / "head.pth").make_head()


# ----------------------------------------------------------------------------------------------- images
def _photo(mode: str = "RGB", side: int = 24) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side + 8, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is there `count` times and which claims `side` x `side` pixels."""
    data = _encoded(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    frame = data.index(b"\xff\xc2")
    data = data[: frame + 5] + struct.pack(">HH", side, side) + data[frame + 9 :]
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * count + b"\xff\xd9"


def _jpegs() -> list[Seed]:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        _encoded(_photo(), "JPEG"),
        _encoded(_photo(), "JPEG", progressive=True, exif=exif),
        _encoded(_photo("L"), "JPEG"),
        _encoded(_photo("CMYK"), "JPEG"),
        _scans(5_000, 9_000),
    ]
    return [{"x.jpg": data} for data in files]


def _pngs() -> list[Seed]:
    deep = Image.fromarray(np.arange(24 * 24, dtype=np.uint16).reshape(24, 24) * 99)
    bomb = [
        b"IHDR",
        struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0),
        b"IDAT",
        bytes(1 << 20),
        b"IEND",
        b"",
    ]
    photo = chunks(_encoded(_photo(), "PNG"))
    profile = [*photo[:2], b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)), *photo[2:]]
    files = [_encoded(_photo(mode), "PNG") for mode in ("RGB", "L", "P", "RGBA", "1")]
    files += [_encoded(deep, "PNG"), join_chunks(bomb), join_chunks(profile)]
    return [{"x.png": data} for data in files]


def _webps() -> list[Seed]:
    frames = [_photo(), _photo("L").convert("RGB")]
    files = [
        _encoded(_photo(), "WEBP"),
        _encoded(_photo("RGBA"), "WEBP", lossless=True),
        _encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    ]
    return [{"x.webp": data} for data in files]


def _decode_all(folder: Path) -> None:
    """Everything that is done with the bytes of an image; each must refuse in the documented way."""
    data = next(file for file in folder.iterdir() if file.suffix in (".jpg", ".png", ".webp")).read_bytes()
    refusals = []
    for use in (_walk, decode, read_size, read_turn, lambda data: open_image(data).whole()):
        try:
            use(data)
        except DamagedDataError as error:
            refusals.append(_without_frames(error))
    if refusals:
        raise refusals[0]


def _without_frames(error: BaseException) -> BaseException:
    """An error, and what caused it, that no longer holds the pixels of the frames it came from."""
    each: BaseException | None = error
    while each:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error


def _walk(data: bytes) -> None:
    if (frame := jpeg.read_frame(data)) and frame.width * frame.height < 1 << 20:
        for reduction in (1, 4):
            jpeg.decode_rows(data, frame, max(frame.height // 2, 1), reduction)
    if (header := png.read_header(data)) and header.width * header.height < 1 << 20:
        png.decode_corner(data, header, max(header.width // 2, 1), max(header.height // 2, 1))


def _targets() -> list[Seed]:
    buffer, bad = io.BytesIO(), io.BytesIO()
    np.save(buffer, np.ones((4, 6), np.float32))
    np.save(bad, np.array([Bomb()], dtype=object), allow_pickle=True)
    return [{"x.npy": buffer.getvalue()}, {"x.npy": bad.getvalue()}]


def _read_mask(folder: Path) -> None:
    open_mask(folder / "x.png").whole()


def _read_depth(folder: Path) -> None:
    open_depth(next(folder.glob("x.*")), 1000.0).whole()


# ------------------------------------------------------------------------------------ tars and statistics
def _tar(format: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in (
            ("a.jpg", b"x" * 700),
            ("b" * 80 + "/" + "b" * 70 + ".png", b"y"),
            ("c.txt", b"z"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = dict(options)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _special(kind: bytes, content: bytes) -> bytes:
    """A header of a tar that speaks of the next member, and its content."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def _sparse_tar(extended: bool) -> bytes:
    """A sparse member in GNU's old way; `extended`: it says that more of its table follows."""
    block = bytearray(tarfile.TarInfo("s.jpg").tobuf(tarfile.GNU_FORMAT))
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[386:410] = b"00000000001\000000000010\0"
    block[482:495] = (b"\1" if extended else b"\0") + b"00000001000\0"
    return header(bytes(block)) + (b"" if extended else b"12345678" + bytes(504 + 1024))


def _tars() -> list[Seed]:
    member = _tar(tarfile.USTAR_FORMAT)
    files = [
        *(_tar(format) for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
        _tar(tarfile.PAX_FORMAT, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
        _tar(tarfile.PAX_FORMAT, **{"GNU.sparse.map": "0,10,20,5", "GNU.sparse.size": "100"}),
        *(_sparse_tar(extended) for extended in (False, True)),
        _special(tarfile.XHDTYPE, b"1" * (1 << 20)) + member,  # a regular expression of tarfile is quadratic
        _special(tarfile.XHDTYPE, b"20 size=-1000000000\n") + member,
        b"".join(_special(tarfile.GNUTYPE_LONGNAME, b"n") for _ in range(3000)) + member,
    ]
    return [{"x.tar": data} for data in files]


def _read_tar(folder: Path) -> None:
    with open(folder / "x.tar", "rb") as file:
        index = index_tar(file)
        for entry in index.entries[:20]:
            read_member(file.fileno(), entry, index.extents.get(entry.offset))


def _statistics() -> list[Seed]:
    record = {"width": 400, "height": 300, "histogram_score": 6.5, "mae_loss": 0.4}
    texts = [
        json.dumps({"a.jpg": record, "b.jpg": {"error": "cut off"}}),
        '{"a.jpg": {"width": NaN, "height": 1e999, "histogram_score": [], "mae_loss": ' + "9" * 400 + "}}",
        "[" * 100_000,
    ]
    return [{"x.json": text.encode()} for text in texts]


def _read_records(folder: Path) -> None:
    for n, record in enumerate(read_statistics(folder / "x.json").values()):
        has_scores(record, ("width",))
        Curation(str(folder), 4.5, 320, True).rejects(record, n)
    write_statistics(folder / "x.json", {"a.jpg": {"histogram_score": 5.0}})


# ---------------------------------------------------------------------------- texts, logs, feature stores
@dataclass(frozen=True)
class _Options:
    """Stands for the configuration of a program."""

    lr: float = option(1e-3, "", gt=0)
    epochs: int = option(1, "", ge=1)
    head: str | None = option(None, "")
    scale: tuple[float, float] = option((0.0, 1.0), "")
    config: str | None = option(None, "")


def _configs() -> list[Seed]:
    laughs = "&a0 [x, x], " + ", ".join(f"&a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))
    texts = [
        "lr: 1e-4\nepochs: 3\nhead: dpt\nscale: [0.2, 1]\n",
        "lr: &a 0.1\nscale: [*a, 1]\n",
        f"head: [{laughs}]\n",
        "head: " + "[" * 20_000,
        "head: !!python/object/apply:os.system ['touch executed']\n",
        "lr: 2001-99-99\n",
    ]
    return [{"x.yaml": text.encode()} for text in texts]


def _read_config(folder: Path) -> None:
    try:
        parse(_Options, ["--config", str(folder / "x.yaml")])
    except SystemExit as error:
        if error.code != 2:
            raise
        raise ValueError("a usage error") from None


def _logs() -> list[Seed]:
    rows = [{"step": n, "images": 8 * n, "loss": 1 / n, "lr": 1e-3} for n in range(1, 4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return [
        {"log.jsonl": part.encode()}
        for part in (text, text[:-9], "[" * 100_000 + "\n", "[1]\n", '{"step": "1"}\n')
    ]


def _resume_log(folder: Path) -> None:
    Log(folder, 5, True, start_step=2).close()


def _runs() -> list[Seed]:
    log = _logs()[0]["log.jsonl"]
    results = {"task": "monodepth", "dataset": "nyuv2", "head": "dpt", "last": {"epoch": 1, "rmse": 0.5}}
    results |= {"best": {"rmse": {"value": 0.4, "epoch": 1}}}
    config, result = json.dumps({"lr": 1, "mask_ratio": 0.75}).encode(), json.dumps(results).encode()
    return [
        {"log.jsonl": log, "config.json": config, "results.json": result},
        {"config.json": config, "log.jsonl": log, "results.json": result},
        {"results.json": result, "log.jsonl": log},
        {"results.json": b'{"dataset": "<script>alert(1)</script>", "last": [[]]}', "log.jsonl": log},
    ]


def _report(folder: Path) -> None:
    write_report(folder, folder / "report.html")
    if "<script" in (folder / "report.html").read_text(encoding="utf-8"):
        raise AssertionError("a report holds a script")


def _stores() -> list[Seed]:
    from safetensors.torch import save

    tensors = save({"cls": torch.ones(2, 3)})
    rows = [{"image": "a.jpg", "part": 0, "row": 0, "size": [4, 4]}, {"image": "b.jpg", "error": "cut off"}]
    index = "".join(json.dumps(row) + "\n" for row in rows).encode()
    settings = json.dumps({"size": 4}).encode()
    parts = {"part_000000.safetensors": tensors, "part_000000.jsonl": index, "settings.json": settings}
    second = {name.replace("0.", "1."): data for name, data in parts.items() if name != "settings.json"}
    parts |= second
    unnamed = parts | {"part_000000.jsonl": b'{"error": "cut off"}\n'}
    return [unnamed] + [
        {first: parts[first]} | parts
        for first in ("part_000000.jsonl", "part_000000.safetensors", "settings.json")
    ]


def _read_store(folder: Path) -> None:
    (folder / "index.jsonl").unlink(missing_ok=True)
    parts = [ShardRange(0, 0, 2), ShardRange(0, 2, 4)]
    store = FeatureStore(folder, [], parts, {"size": 4})
    store.fill(SimpleNamespace(runtime=ALONE, run=lambda *_: iter(())))
    array = store.array("cls")
    array[0 : len(array)]
    array[[0]]


def _splits() -> list[Seed]:
    lines = "a.jpg b.png\n/a.jpg b.png 518.8\na.jpg None\n"
    texts = [
        lines.encode(),
        lines.encode("utf-16"),
        b"\xff\xfea",
        b"a.jpg\0 b.png\n",
        ("x" * 5000 + "/a b\n").encode(),
    ]
    return [{"split.txt": text, "a.jpg": b"", "b.png": b""} for text in texts]


def _read_split(folder: Path) -> None:
    read_split_file(folder, folder / "split.txt", ("sync/",))


# ---------------------------------------------------------------------------------------------- readers
def _load(name: str) -> Callable[[Path], object]:
    return lambda folder: pixio.from_pretrained(folder / name, 2)


_WEIGHTS = (ValueError, FileNotFoundError)
_LARGEST = 2 << 30  # MAX_PIXELS, three or four times in memory: as decoded, as bytes, as an array
READERS = {
    "weights .pth": Reader(_load("x.pth"), weight_seeds.torch_files, _WEIGHTS, ZIP, slow=True),
    "weights .safetensors": Reader(
        _load("x.safetensors"),
        weight_seeds.safetensors_files,
        _WEIGHTS,
        SAFETENSORS,
        slow=True,
    ),
    "weights folder": Reader(_load(""), weight_seeds.weight_folders, _WEIGHTS, slow=True),
    "checkpoint": Reader(pixio.load_mae, weight_seeds.checkpoints, _WEIGHTS, ZIP, slow=True),
    "head file": Reader(_read_head, weight_seeds.heads, _WEIGHTS, ZIP, slow=True),
    "jpeg": Reader(_decode_all, _jpegs, (DamagedDataError,)),
    "png": Reader(_decode_all, _pngs, (DamagedDataError,), PNG, memory=_LARGEST),
    "webp": Reader(_decode_all, _webps, (DamagedDataError,), memory=_LARGEST),
    "mask png": Reader(_read_mask, _pngs, (ValueError,), PNG),
    "depth png": Reader(_read_depth, _pngs, (ValueError,), PNG, memory=_LARGEST),
    "depth npy": Reader(_read_depth, _targets, (ValueError,)),
    "tar": Reader(_read_tar, _tars, (DamagedDataError,), TAR),
    "statistics": Reader(_read_records, _statistics, (DamagedDataError,)),
    "yaml": Reader(_read_config, _configs, (ValueError,), LINES, slow=True),
    "log": Reader(lambda folder: save_curves([folder], io.BytesIO()), _logs, (ValueError,), LINES, slow=True),
    "log resumed": Reader(_resume_log, _logs, (), LINES),
    "report": Reader(_report, _runs, (ValueError, FileNotFoundError), slow=True),
    "feature store": Reader(_read_store, _stores, (ValueError,), slow=True),
    "split file": Reader(_read_split, _splits, (ValueError, FileNotFoundError), LINES),
}
