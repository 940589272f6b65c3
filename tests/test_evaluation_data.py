"""Data of dense evaluation: the published lists, reading, cropping, the order of images, LoveDA's masks."""

import hashlib
import io
import itertools
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dense.data import (
    DataSource,
    PairDataset,
    StepSampler,
    _oddities,
    crop_and_flip,
    describe_turn,
    open_photo,
    open_split,
    train_batches,
    whole_examples,
)
from dense.listing import Pair, read_split_file
from eval_semseg import SegmentationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from monodepth import data as depth_data
from monodepth.data import list_kitti, list_nyuv2
from PIL import Image
from semseg import data as mask_data
from semseg.data import list_ade20k, list_loveda, list_pascal, mask_source
from semseg.util import process_loveda

from pixio.images.crops import draw_scaled_crop
from pixio.images.rasters import raster_of
from pixio.images.targets import drop_zero, open_depth, open_mask


def digest(pairs: list[Pair]) -> str:
    lines = sorted(f"{image} {target}\n" for image, target in pairs)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def touch(root: Path, paths) -> None:
    """Empty files: hard links to one, which many file systems make far faster than files."""
    for folder in {path.rpartition("/")[0] for path in paths}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        if number % 30_000 == 0:  # file systems allow 65,000 links, say
            source = f"{root}/{path}"
            open(source, "x").close()
        else:
            os.link(source, f"{root}/{path}")


@pytest.fixture
def tree(tmp_path):
    """A folder for tens of thousands of files, removed right after the test."""
    folder = tmp_path / "tree"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def png(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, "PNG")
    return path


# --- the published lists ------------------------------------------------------------------------------------


def test_kitti_lists_the_published_frames(tree):
    runs = {}
    for line in Path(depth_data.__file__).with_name("kitti_eigen.txt").read_text().splitlines():
        if not line.startswith("#"):
            _, drive, *frames = line.split()
            last = max(int(frame.split("/")[0].split("-")[-1]) for frame in frames)
            runs[drive] = last
    images, depths = [], []
    for drive, last in runs.items():
        frames = f"images/{drive[:10]}/{drive}_sync/image_0{{}}/data"
        truth = f"annotations/{drive}_sync/proj_depth/groundtruth/image_0{{}}"
        # as published: images from 0, annotations without the first and last five
        images += [f"{frames.format(2)}/{n:010d}.png" for n in range(last + 6)]
        depths += [f"{truth.format(2)}/{n:010d}.png" for n in range(5, last + 1)]
        for folder in (frames, truth):  # the right camera, hidden files, thumbnails
            images += [f"{folder.format(3)}/{n:010d}.png" for n in (5, 6)]
            images += [
                f"{folder.format(2)}/{name}" for name in (".0000000005.png", "Thumbs.db", "5_thumb.png")
            ]
    touch(tree, images + depths)
    train, val = list_kitti(tree, "train"), list_kitti(tree, "val")
    assert digest(train.pairs) == "cdb1415f746918dda2c099fe69b6ff5a3d4336f3d4550c69f15edcaa5f737b6c"
    assert digest(val.pairs) == "a168b1d03382977e0149e0f9822b9c860a629b047aba5f0cc3816b01a874e929"
    assert not train.missing
    assert not val.missing


def test_ade20k_lists_the_published_images(tree):
    paths = []
    for folder, split, count in (("training", "train", 20_210), ("validation", "val", 2_000)):
        for n in range(1, count + 1):
            name = f"{folder}/ADE_{split}_{n:08d}"
            paths += [f"images/{name}.jpg", f"annotations/{name}.png"]
        paths += [
            f"images/{folder}/.ADE_{split}_00000001.jpg",
            f"images/{folder}/ADE_{split}_00000001_thumb.jpg",
        ]
        paths += [f"annotations/{folder}/Thumbs.db", f"annotations/{folder}/.ADE_{split}_00000001.png"]
    touch(tree, paths)
    train, val = list_ade20k(tree, "train"), list_ade20k(tree, "val")
    assert digest(train.pairs) == "52146240194d375841c1759ae63fa18f5c4ddedf8fc9e24008614ebd760cb19d"
    assert digest(val.pairs) == "8a733f0c20d8f6cd6450b775a2f9e0d9d328af6d8a3aaf50db55d964d18d584c"


def test_loveda_lists_the_published_tiles(tree):
    paths = []
    for split, half, first, last in (
        ("Train", "Rural", 0, 1365),
        ("Train", "Urban", 1366, 2521),
        ("Val", "Rural", 2522, 3513),
        ("Val", "Urban", 3514, 4190),
    ):
        top = f"{split}/{split}/{half}"
        for folder in ("images_png", "masks_png", "masks_png_raw"):
            paths += [f"{top}/{folder}/{n}.png" for n in range(first, last + 1)]
            paths += [
                f"{top}/{folder}/{name}" for name in (f".{first}.png", "Thumbs.db", f"{first}_thumb.png")
            ]
    touch(tree, paths)
    train, val = list_loveda(tree, "train"), list_loveda(tree, "val")
    assert digest(train.pairs) == "87053e414fd821d8d3f6bd467a9539626a8485b545913330c1668192682ac540"
    assert digest(val.pairs) == "f9de865e6666be23361243d90458a1e5878757acfb00f542065c1d19f41adf48"


def test_nyuv2_pairs_every_image_with_its_depth(tmp_path):
    for folder in ("sync/kitchen_1", "sync/.hidden", "official_splits/test/attic"):
        touch(tmp_path, [f"{folder}/{name}" for name in ("rgb_00001.jpg", "sync_depth_00001.png")])
    touch(
        tmp_path,
        ["sync/kitchen_1/rgb_00002.jpg", "sync/kitchen_1/.rgb_00001.jpg", "sync/kitchen_1/Thumbs.db"],
    )
    touch(
        tmp_path, ["sync/kitchen_1/sync_depth_00003.png", "sync/rgb_00009.jpg", "sync/sync_depth_00009.png"]
    )
    train, val = list_nyuv2(tmp_path, "train"), list_nyuv2(tmp_path, "val")
    assert train.pairs == [("sync/kitchen_1/rgb_00001.jpg", "sync/kitchen_1/sync_depth_00001.png")]
    assert train.missing == ["sync/kitchen_1/sync_depth_00002.png"]
    test = "official_splits/test/attic"
    assert val.pairs == [(f"{test}/rgb_00001.jpg", f"{test}/sync_depth_00001.png")]


def test_pascal_trains_on_every_mask_that_is_not_for_validation(tmp_path):
    for name in ("2007_1", "2007_2", "2008_3", "2009_4"):
        touch(tmp_path, [f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png"])
    touch(
        tmp_path,
        ["JPEGImages/2010_unmasked.jpg", "SegmentationClass/.2007_1.png", "SegmentationClass/Thumbs.db"],
    )
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2008_3\n2007_2\n")
    assert [pair.image for pair in list_pascal(tmp_path, "val").pairs] == [
        "JPEGImages/2008_3.jpg",
        "JPEGImages/2007_2.jpg",
    ]
    assert list_pascal(tmp_path, "train").pairs == [
        ("JPEGImages/2007_1.jpg", "SegmentationClass/2007_1.png"),
        ("JPEGImages/2009_4.jpg", "SegmentationClass/2009_4.png"),
    ]


def test_pascal_as_its_readme_draws_it_has_the_published_validation_split(tree):
    lines = (Path(mask_data.__file__).with_name("pascal_val.txt")).read_text().splitlines()[1:]
    val = [f"{year}{int(n):06d}" for year, *numbers in map(str.split, lines) for n in numbers]
    names = [*val, "2007_000032", "2012_004331"]
    touch(
        tree, [path for name in names for path in (f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png")]
    )
    listing = list_pascal(tree, "val")
    assert digest(listing.pairs) == "df002e3a730c57678f63aa3e46a4c827a4066f1dc1814e24d0e8b215075e0c6c"
    assert [Path(pair.image).stem for pair in list_pascal(tree, "train").pairs] == [
        "2007_000032",
        "2012_004331",
    ]


def test_pascals_own_list_wins_over_ours(tmp_path):
    touch(tmp_path, ["JPEGImages/2007_000033.jpg", "SegmentationClass/2007_000033.png"])
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("\ufeff2009_1\r\n", encoding="utf-8")
    assert list_pascal(tmp_path, "val").missing == ["JPEGImages/2009_1.jpg", "SegmentationClass/2009_1.png"]
    assert len(list_pascal(tmp_path, "train").pairs) == 1


def test_a_folder_of_ones_own_is_paired_by_name_in_subfolders_too(tmp_path):
    touch(
        tmp_path, ["train/images/a.jpg", "train/images/in/b.PNG", "train/images/c.webp", "train/images/d.txt"]
    )
    touch(
        tmp_path, ["train/depth/a.png", "train/depth/in/b.npy", "train/images/.e.jpg", "train/depth/.e.png"]
    )
    touch(
        tmp_path, [f"train/{name}" for name in ("images/f.jpg", "depth/f.PNG", "images/g.jpg", "depth/g.npy")]
    )
    touch(tmp_path, ["train/depth/g.png"])
    listing = depth_data.RULES["folder"](tmp_path, "train")
    assert listing.pairs == [
        ("train/images/a.jpg", "train/depth/a.png"),
        ("train/images/f.jpg", "train/depth/f.PNG"),
        ("train/images/g.jpg", "train/depth/g.png"),
        ("train/images/in/b.PNG", "train/depth/in/b.npy"),
    ]
    assert listing.missing == ["train/depth/c.png"]


def open_ade20k(root: Path, published: int, **settings) -> PairDataset:
    config = SegmentationConfig(
        dataset="ade20k", nclass=150, data_root=str(root), apply_exif=True, **settings
    )
    source = DataSource(list_ade20k, {"val": published}, read_zero, crop_and_flip, inspect=lambda _: "")
    return open_split(source, config, "val", None, warns=True)


def test_another_count_than_published_names_missing_files(tmp_path, capsys):
    for n in (1, 3):
        touch(
            tmp_path,
            [f"images/validation/ADE_val_{n:08d}.jpg", f"annotations/validation/ADE_val_{n:08d}.png"],
        )
    touch(tmp_path, ["images/validation/ADE_val_00000002.jpg"])
    assert len(open_ade20k(tmp_path, 2_000)) == 2
    warning = capsys.readouterr().err
    assert "holds 2 val pairs, the published split 2000" in warning
    assert "missing annotations/validation/ADE_val_00000002.png" in warning


def test_the_published_count_is_no_warning(tmp_path, capsys):
    touch(tmp_path, ["images/validation/ADE_val_00000001.jpg", "annotations/validation/ADE_val_00000001.png"])
    open_ade20k(tmp_path, 1)
    assert capsys.readouterr().err == ""


def test_a_missing_folder_and_an_empty_one_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder; set --data_root"):
        open_ade20k(tmp_path / "nowhere", 2_000)
    missing = r"holds no val pairs; missing images/validation/ADE_val_00000001"
    with pytest.raises(FileNotFoundError, match=missing):
        open_ade20k(tmp_path, 2_000)
    (tmp_path / "split.txt").write_text("\n")
    with pytest.raises(FileNotFoundError, match=r"split\.txt names no val pairs"):
        open_ade20k(tmp_path, 2_000, val_split_file=str(tmp_path / "split.txt"))


def test_hidden_files_and_junk_folders_are_no_data(tmp_path):
    junk = ("._a", ".ipynb_checkpoints/a", "@eaDir/a", "__MACOSX/a", ".Trash-1000/a")
    for name in ("a", *junk):
        touch(tmp_path, [f"train/images/{name}.jpg", f"train/masks/{name}.png"])
    listing = mask_data.RULES["folder"](tmp_path, "train")
    assert listing == ([("train/images/a.jpg", "train/masks/a.png")], [])


# --- split files --------------------------------------------------------------------------------------------


def test_a_split_file_overrides_the_rule_and_its_count(tmp_path, capsys):
    touch(tmp_path, ["a.jpg", "a.png", "in side/b.jpg", "b.png"])
    file = tmp_path / "split.txt"
    file.write_text("a.jpg a.png\n\nin side/b.jpg\tb.png\n")
    data = open_ade20k(tmp_path, 2_000, val_split_file=str(file))
    assert data.pairs == [("a.jpg", "a.png"), ("in side/b.jpg", "b.png")]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfa.jpg a.png\r\nin/b.jpg in/b.png\r\n",
        "a.jpg a.png\nin/b.jpg in/b.png\n".encode("utf-16"),
        b"/a.jpg /a.png\n/in/b.jpg /in/b.png",
        b"a.jpg a.png 518.8579\nin/b.jpg in/b.png 721\n",
        b"/a.jpg /a.png 518.8579\n/in/c.jpg None 518.8579\n/in/b.jpg /in/b.png 518.8579\n",
        b"a.jpg\ta.png\t518.8579\nin/b.jpg\tin/b.png\t518.8579\n",
    ],
)
def test_split_files_of_other_programs_are_read(tmp_path, content):
    touch(tmp_path, ["a.jpg", "a.png", "in/b.jpg", "in/b.png", "in/c.jpg"])
    (tmp_path / "split.txt").write_bytes(content)
    expected = [("a.jpg", "a.png"), ("in/b.jpg", "in/b.png")]
    assert read_split_file(tmp_path, tmp_path / "split.txt") == expected


def test_a_split_file_in_damaged_utf_16_is_named(tmp_path):
    (tmp_path / "split.txt").write_bytes("a.jpg a.png".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"split\.txt begins as UTF-16, but is not"):
        read_split_file(tmp_path, tmp_path / "split.txt")


def test_the_lists_of_bts_are_read_below_the_root_of_nyuv2_and_kitti(tmp_path):
    nyuv2, kitti = (depth_data.depth_source(name, 1, 10, None, False).folders for name in ("nyuv2", "kitti"))
    touch(tmp_path, ["sync/attic/rgb_1.jpg", "sync/attic/sync_depth_1.png"])
    touch(tmp_path, ["images/d1/1_sync/image_02/1.png", "annotations/1_sync/proj_depth/1.png"])
    file = tmp_path / "split.txt"
    file.write_text("/attic/rgb_1.jpg /attic/sync_depth_1.png 518.8579\n")
    assert read_split_file(tmp_path, file, nyuv2) == [("sync/attic/rgb_1.jpg", "sync/attic/sync_depth_1.png")]
    file.write_text("d1/1_sync/image_02/1.png 1_sync/proj_depth/1.png 721.5377\n")
    assert read_split_file(tmp_path, file, kitti) == [
        ("images/d1/1_sync/image_02/1.png", "annotations/1_sync/proj_depth/1.png")
    ]


def test_absolute_paths_and_names_of_any_bytes_are_read_from_a_split_file(tmp_path):
    name = b"\xe9t\xe9.jpg".decode(errors="surrogateescape")
    touch(tmp_path, [name, "a.png"])
    (tmp_path / "split.txt").write_text(f"{name}\t{tmp_path}/a.png\n", errors="surrogateescape")
    assert read_split_file(tmp_path, tmp_path / "split.txt") == [(name, f"{tmp_path}/a.png")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg a.png b.png\n", "line 1: expected an image and its target"),
        ("\na.jpg\n", "line 2: expected an image and its target"),
        ("a.jpg gone.png\n", "names 1 files that .* lacks, such as gone.png"),
        ("/a.jpg /gone.png\n", "such as /gone.png"),
    ],
)
def test_a_wrong_split_file_is_an_error(tmp_path, text, message):
    touch(tmp_path, ["a.jpg", "a.png"])
    file = tmp_path / "split.txt"
    file.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_split_file(tmp_path, file)


# --- reading ------------------------------------------------------------------------------------------------


def test_depth_pngs_are_in_units_of_their_data_set(tmp_path):
    file = png(tmp_path / "d.png", np.array([[0, 1000], [512, 65535]], np.uint16))
    assert open_depth(file, 1000).whole().tolist() == [[0, 1], [np.float32(0.512), np.float32(65.535)]]
    assert open_depth(file, 256).whole()[1, 0] == 2


def test_depth_arrays_are_in_meters_and_unknown_where_not_finite(tmp_path):
    np.save(tmp_path / "d.npy", np.array([[1.5, np.nan], [np.inf, 0]]))
    assert open_depth(tmp_path / "d.npy", 1000).whole().tolist() == [[1.5, 0], [0, 0]]


def test_nyuv2_keeps_the_inside_of_its_frame_in_image_and_depth(tmp_path):
    rows, columns = np.mgrid[:480, :640]
    image = np.stack([rows % 256, columns % 256, rows * 0], axis=2).astype(np.uint8)
    image_file = png(tmp_path / "rgb.png", image)
    depth_file = png(tmp_path / "depth.png", (rows * 64 + columns).astype(np.uint16))
    pair = depth_data.open_depth_pair(image_file, depth_file, "nyuv2", 1000, False)
    found, depth = (raster.whole() for raster in pair)
    assert depth.shape == (426, 560)
    assert depth[0, 0] == pytest.approx((45 * 64 + 41) / 1000)
    assert depth[-1, -1] == pytest.approx((470 * 64 + 600) / 1000)
    np.testing.assert_array_equal(found, image[45:471, 41:601])


def test_palette_masks_give_class_numbers(tmp_path):
    image = Image.frombytes("P", (2, 2), bytes([0, 3, 255, 1]))
    image.putpalette([channel for color in range(256) for channel in (255 - color, color, 0)])
    image.save(tmp_path / "m.png")
    assert open_mask(tmp_path / "m.png").whole().tolist() == [[0, 3], [255, 1]]


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_large_color_profiles_cost_no_target(tmp_path, mode):
    values = np.array([[0, 3], [255, 1]], np.uint16 if mode == "I;16" else np.uint8)
    image = Image.frombytes(mode, (2, 2), values.tobytes())
    if mode == "P":
        image.putpalette(range(256))
    profile = np.random.default_rng(0).bytes(3_000_000)
    image.save(tmp_path / "m.png", icc_profile=profile)
    opened = partial(open_depth, units_per_meter=1) if mode == "I;16" else open_mask
    assert opened(tmp_path / "m.png").whole().tolist() == values.tolist()
    assert describe_turn(tmp_path / "m.png") == ""


def png_of(values: np.ndarray, bits: int, palette: bool) -> bytes:
    """A PNG written by hand, with `bits` per pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape
    planes = (values[..., None] >> np.arange(bits)[::-1] & 1).reshape(height, -1)  # one bit after another
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(planes.astype(np.uint8), axis=1))
    header = struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 0, 0, 0, 0)
    colors = chunk(b"PLTE", bytes(range(3 * 2**bits)) if bits < 8 else bytes(768)) if palette else b""
    data = chunk(b"IHDR", header) + colors + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("palette", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_give_class_numbers_as_stored(tmp_path, bits, palette):
    mask = np.random.default_rng(0).integers(0, 2**bits, (5, 13), dtype=np.uint8)
    (tmp_path / "m.png").write_bytes(png_of(mask, bits, palette))
    found = open_mask(tmp_path / "m.png").whole()
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, mask)


def test_masks_that_count_from_one_can_be_read():
    mask = np.array([[0, 1], [150, 255]], np.uint8)
    assert drop_zero(mask).tolist() == [[255, 0], [149, 255]]


def claiming(rows: int) -> bytes:
    """The beginning of an .npy file that says it holds so many rows of floats."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, 1024)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(64)


FLIP = Image.Transpose
# how a camera that notes an orientation stores an upright scene: the inverse of what turns it back
STORED = dict(
    zip(
        range(2, 9),
        (
            *(FLIP.FLIP_LEFT_RIGHT, FLIP.ROTATE_180, FLIP.FLIP_TOP_BOTTOM, FLIP.TRANSPOSE),
            *(FLIP.ROTATE_90, FLIP.TRANSVERSE, FLIP.ROTATE_270),
        ),
        strict=True,
    )
)
GRAY8, GRAY16 = np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.uint16)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("d.png", GRAY8, r"d\.png is not usable: its pixel format is L, expected 16-bit"),
        ("d.png", b"no image", r"d\.png is not usable"),
        ("d.png", GRAY16[:3], r"d\.png has 3 x 5 pixels, but its image .*i\.png 4 x 5"),
        ("d.npy", b"no array", r"d\.npy is not a readable \.npy file"),
        ("d.npy", b"PK\3\4 a damaged .npz", r"d\.npy is not a readable \.npy file"),
        ("d.npy", b"PK\5\6" + bytes(18), r"d\.npy is not a readable \.npy file"),
        ("d.npy", claiming(1 << 50), r"d\.npy is not a readable \.npy file"),
        ("d.npy", np.zeros((4, 5, 1)), r"d\.npy holds float64 \[4, 5, 1\]"),
        ("d.npy", np.zeros((4, 5), int), r"d\.npy holds int64"),
    ],
)
def test_bad_depth_is_an_error_that_names_the_file(tmp_path, name, target, message):
    png(tmp_path / "i.png", np.zeros((4, 5, 3), np.uint8))
    write(tmp_path / name, target)
    read = lambda image, depth: depth_data.open_depth_pair(image, depth, "folder", 1000, False)  # noqa: E731
    items = PairDataset(tmp_path, [Pair("i.png", name)], read)
    with pytest.raises(ValueError, match=message):
        list(whole_examples(items, [0], num_workers=0, pin_memory=False))


def write(path: Path, content: np.ndarray | bytes) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".npy":
        np.save(path, content)
    else:
        png(path, content)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((4, 5), 7, np.uint8), r"m\.png holds class 7, expected 0-6 or 255 .*: do this"),
        (np.zeros((4, 6), np.uint8), r"m\.png has 4 x 6 pixels, but its image"),
        (np.zeros((4, 5, 3), np.uint8), r"m\.png is not usable: its pixel format is RGB"),
        (b"\x89PNG", r"m\.png is not usable"),
    ],
)
def test_a_bad_mask_is_an_error_that_names_the_file(tmp_path, mask, message):
    png(tmp_path / "i.png", np.zeros((4, 5, 3), np.uint8))
    write(tmp_path / "m.png", mask)
    read = lambda image, mask: mask_data.open_mask_pair(image, mask, 7, False, False, "do this")  # noqa: E731
    items = PairDataset(tmp_path, [Pair("i.png", "m.png")], read)
    with pytest.raises(ValueError, match=message):
        list(whole_examples(items, [0], num_workers=0, pin_memory=False))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_an_error_without_a_workers_traceback(tmp_path, num_workers):
    (tmp_path / "i.png").write_bytes(b"no image")
    png(tmp_path / "m.png", GRAY8)
    items = PairDataset(tmp_path, [Pair("i.png", "m.png")], read_zero)
    with pytest.raises(ValueError, match=r"i\.png is not a readable image") as error:
        list(train_batches(items, iter([[(0, 0, 0, 1)]]), num_workers, pin_memory=False))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_stay_over_their_targets_whatever_the_camera_noted(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_photo(tmp_path / "a.png").whole(), pixels)


@pytest.mark.parametrize("turn", range(2, 9))
def test_a_turned_photo_beside_an_upright_mask_is_named_and_can_be_turned(tmp_path, capsys, turn):
    rows, columns = np.mgrid[:6, :9]
    upright = np.stack([rows * 20, columns * 20, rows * 0], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = Image.fromarray(upright).transpose(STORED[turn])
    for folder in ("val/images", "val/masks"):
        (tmp_path / folder).mkdir(parents=True)
    stored.save(tmp_path / "val/images/a.png", exif=exif)
    png(tmp_path / "val/masks/a.png", rows.astype(np.uint8))

    def opened(apply_exif: bool) -> PairDataset:
        config = SegmentationConfig(
            dataset="folder", nclass=6, data_root=str(tmp_path), apply_exif=apply_exif
        )
        return open_split(mask_source("folder", 6, False, apply_exif), config, "val", None, warns=True)

    image = next(whole_examples(opened(True), [0], num_workers=0, pin_memory=False)).image
    np.testing.assert_array_equal(image.permute(1, 2, 0), upright)
    assert capsys.readouterr().err == ""
    if turn > 4:
        with pytest.raises(ValueError, match=rf"9 x 6: both .*a\.png \(orientation {turn}\), --apply_exif"):
            opened(False)
    else:
        opened(False)
        assert f"a.png (orientation {turn}), --apply_exif applies it" in capsys.readouterr().err


def read_zero(image: Path, target: Path):
    return open_photo(image), raster_of(np.zeros((4, 5), np.uint8))


# --- targets that teach nothing -----------------------------------------------------------------------------


def inspect_depth(*depths: float, scale: float = 1000, suffix: str = "png") -> str:
    files = [(Path(f"{i}.{suffix}"), torch.full((4, 4), depth)) for i, depth in enumerate(depths)]
    return depth_data.inspect_depth(files, 0.001, 10, scale)


@pytest.mark.parametrize(
    ("depths", "options", "message"),
    [
        ((0, 0), {}, r"no depth is measured in 2 files such as 0\.png"),
        ((50, 0), {}, r"0\.png holds 50 to 50 m .*--max_depth 10.* 1000 now, with 5000 .* be 10 m"),
        ((2000,), {"scale": 1}, r"0\.png holds 2000 .*, 1 now, with 1000 .* be 2 m"),
        ((2000,), {"suffix": "npy"}, r"0\.npy holds 2000 .*\.npy files are in meters"),
    ],
)
def test_depth_without_a_pixel_that_counts_says_what_was_found_and_what_to_do(depths, options, message):
    with pytest.raises(ValueError, match=message):
        inspect_depth(*depths, **options)


def test_depth_of_a_wrong_unit_is_a_warning_where_some_of_it_counts():
    assert inspect_depth(2, 8, 3) == ""
    assert "67% of the depth in 3 files does not count: 2.png holds 40" in inspect_depth(2, 30, 40)
    assert "far below the limit: 0.png holds 0.3 to 0.3 m" in (text := inspect_depth(0.3, 0.2))
    assert "1000 now, with 100 the farthest would be 3 m" in text
    assert inspect_depth(2, 0) == "no pixel of 1 of 2 depth files counts, such as 1.png"


@pytest.mark.parametrize(("labelled", "read"), [(None, 16 + 256), (3, 16 + 256), (0, 16)])
def test_more_targets_are_looked_at_before_a_split_is_refused(labelled, read):
    looked_at = []

    def target_of(image: Path, target: Path):
        looked_at.append(target.name)
        mask = np.full((4, 4), 0 if target.name == f"{labelled}.png" else 255)
        return raster_of(np.zeros((4, 4, 3), np.uint8)), raster_of(mask)

    data = PairDataset(Path(), [Pair("i.png", f"{i}.png") for i in range(1000)], target_of)
    odd = _oddities(mask_source("folder", 3, False, True), data, applies_exif=True)
    if labelled is None:
        with pytest.raises(ValueError, match="no pixel of 256 masks is scored"):
            next(odd)
    else:
        assert f"{read - 16 or 16} masks such as 0.png hold class 0 of 3 alone" in next(odd)
    assert len(looked_at) == read


def inspect_masks(*values: int, reduce_zero_label: bool = False) -> str:
    files = [(Path(f"{i}.png"), torch.full((4, 4), value).byte()) for i, value in enumerate(values)]
    return mask_data.inspect_masks(files, 3, reduce_zero_label, "do this")


def test_masks_without_a_scored_pixel_say_what_was_found_and_what_to_do():
    with pytest.raises(
        ValueError, match=r"no pixel of 2 masks .* 0\.png holds 255 \(ignored\) alone.*do this"
    ):
        inspect_masks(255, 255)
    with pytest.raises(ValueError, match=r"0\.png holds 0 \(ignored by --reduce_zero_label\) and 255 alone"):
        inspect_masks(255, reduce_zero_label=True)


def test_masks_of_one_class_alone_are_a_warning():
    assert inspect_masks(0, 2) == inspect_masks(1) == ""
    assert "2 masks such as 0.png hold class 0 of 3 alone" in inspect_masks(0, 0)
    assert inspect_masks(0, 1, 255) == "1 of 3 masks have no scored pixel, such as 2.png"


# --- crops --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), size=st.integers(1, 16), seed=st.integers(0, 99))
def test_a_crop_shows_the_same_place_in_image_and_target(height, width, size, seed):
    places = np.arange(1, height * width + 1).reshape(height, width)
    image = np.stack([places // 256, places % 256, places * 0 + 9], axis=2).astype(np.uint8)
    crop, target = crop_and_flip(
        np.random.default_rng(seed), raster_of(image), raster_of(places), size, fill=0
    )
    assert crop.shape == (size, size, 3)
    assert target.shape == (size, size)
    inside = target > 0
    np.testing.assert_array_equal(crop[..., 0] * np.int64(256) + crop[..., 1], target)
    assert (crop[inside, 2] == 9).all()
    assert (crop[~inside] == 0).all()
    assert inside.sum() == min(size, height) * min(size, width)


def test_crops_are_mirrored_half_of_the_time():
    ramp, image = raster_of(np.tile(np.arange(8), (8, 1))), raster_of(np.zeros((8, 8, 3), np.uint8))
    crops = [crop_and_flip(np.random.default_rng(seed), image, ramp, 8, 0)[1] for seed in range(400)]
    assert 160 < sum(crop[0, 0] == 7 for crop in crops) < 240


def test_segmentation_scales_the_longer_side_by_a_half_to_two_and_pads_unscored():
    sizes = Counter()
    for seed in range(300):
        crop = draw_scaled_crop(np.random.default_rng(seed), 20, 40, 16, mask_data.SCALES)
        assert abs(crop.height * 2 - crop.width) <= 1
        sizes[crop.width] += 1
    assert (min(sizes), max(sizes)) == (20, 80)
    crop = mask_source("folder", 6, False, False).crop
    image, mask = raster_of(np.full((20, 40, 3), 9, np.uint8)), raster_of(np.full((20, 40), 5, np.uint8))
    pixels, classes = crop(np.random.default_rng(0), image, mask, size=96)
    assert set(np.unique(classes)) == {5, 255}
    assert (pixels[classes == 5] == 9).all()
    assert not pixels[classes == 255].any()


# --- order --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    items=st.integers(1, 30),
    groups=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_ranks_together_read_what_one_rank_would(items, groups, batch, seed):
    sampler = StepSampler(items, groups * batch, seed)
    stop = 2 * sampler.steps_per_epoch
    alone = list(sampler.keys(0, stop, 0, 1))
    for world_size in (n for n in (1, 2, 4) if groups % n == 0):
        ranks = [list(sampler.keys(0, stop, rank, world_size)) for rank in range(world_size)]
        assert [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)] == alone


@settings(max_examples=40, deadline=None)
@given(items=st.integers(1, 30), per_step=st.integers(1, 8), epochs=st.integers(1, 3))
def test_no_image_comes_twice_before_all_have_come_once(items, per_step, epochs):
    sampler = StepSampler(items, per_step, seed=0)
    steps = list(sampler.keys(0, epochs * sampler.steps_per_epoch, 0, 1))
    for epoch in range(epochs):
        begin = epoch * sampler.steps_per_epoch
        visits = [key[0] for step in steps[begin : begin + sampler.steps_per_epoch] for key in step]
        counts = Counter(dict.fromkeys(range(items), 0)) + Counter(visits)
        assert len(visits) == sampler.steps_per_epoch * per_step
        assert max(counts.values()) - min(counts.get(index, 0) for index in range(items)) <= 1


def test_a_resumed_order_goes_on_and_no_two_visits_share_a_seed():
    sampler = StepSampler(7, 3, seed=4)
    steps = list(sampler.keys(0, 8, 0, 1))
    assert list(sampler.keys(5, 8, 0, 1)) == steps[5:]
    seeds = [key[1:] for step in steps for key in step]
    assert len(set(seeds)) == len(seeds)
    assert steps[0] != steps[2]  # epochs differ


# --- LoveDA's masks -----------------------------------------------------------------------------------------


@pytest.fixture
def loveda(tmp_path):
    rng = np.random.default_rng(0)
    masks = {}
    for n, (split, half) in enumerate(
        [("Train", "Rural"), ("Train", "Urban"), ("Val", "Rural"), ("Val", "Urban")]
    ):
        for k in range(3):
            masks[f"{split}/{split}/{half}/masks_png/{3 * n + k}.png"] = rng.integers(0, 8, (6, 6), np.uint8)
    for path, mask in masks.items():
        png(tmp_path / path, mask)
    return tmp_path, masks


def assert_converted(root: Path, masks: dict[str, np.ndarray]) -> None:
    for path, mask in masks.items():
        found = open_mask(root / path).whole().astype(int)
        np.testing.assert_array_equal(found, np.where(mask == 0, 255, mask.astype(int) - 1))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_loveda_masks_are_converted_once_and_only_once(loveda, capsys):
    root, masks = loveda
    process_loveda.main([str(root)])
    assert_converted(root, masks)
    once = files(root)
    process_loveda.main([str(root)])
    assert files(root) == once
    assert "converted already" in capsys.readouterr().out


def test_masks_that_another_script_converted_are_left_alone(loveda):
    root, masks = loveda
    for path, mask in masks.items():
        png(root / path, drop_zero(mask))
    before = files(root)
    process_loveda.main([str(root)])
    assert files(root) == before


@pytest.mark.parametrize("killed_at", range(14))
def test_an_interrupted_conversion_can_be_run_again(loveda, monkeypatch, killed_at):
    root, masks = loveda
    calls = iter(range(100))

    def dying(function):
        def call(*arguments):
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(process_loveda, "write_atomic", dying(process_loveda.write_atomic))
        patch.setattr(Path, "rename", dying(Path.rename))
        with pytest.raises(KeyboardInterrupt):
            process_loveda.main([str(root)])
    for path, mask in masks.items():  # all of a folder's masks, or none, are new: never some, never half
        if (root / path).exists():
            assert open_mask(root / path).whole().max() in (mask.max(), drop_zero(mask).max())
    process_loveda.main([str(root)])
    assert_converted(root, masks)
    assert not list(root.rglob("*.partial"))


def test_the_conversion_is_started_as_a_file_from_the_folder_of_the_programs(loveda):
    root, masks = loveda
    folder = Path(process_loveda.__file__).parents[2]
    command = [sys.executable, "semseg/util/process_loveda.py", str(root)]
    environment = os.environ | {"PYTHONPATH": str(folder.parent)}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert_converted(root, masks)


@pytest.mark.parametrize(("value", "message"), [(255, "mixture"), (9, "mixture")])
def test_masks_that_are_not_lovedas_stay_as_they_are(loveda, value, message):
    root, masks = loveda
    path = next(iter(masks))
    masks[path][0, 0], masks[path][0, 1] = value, 7
    png(root / path, masks[path])
    before = files(root)
    with pytest.raises(SystemExit, match=message):
        process_loveda.main([str(root)])
    assert files(root) == before
