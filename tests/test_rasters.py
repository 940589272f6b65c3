"""Parts of image files: the same pixels as of the whole, from every kind of file."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import encoded, noise, photographs
from PIL import Image

from pixio.images import crops, decoding, png
from pixio.images.crops import ScaledCrop, draw_scaled_crop
from pixio.images.decoding import MAX_PIXELS, DamagedDataError
from pixio.images.rasters import open_image, raster_of
from pixio.images.targets import open_depth, open_mask

FILES = {
    "jpeg": ("JPEG", {"quality": 90}),
    "full chroma": ("JPEG", {"quality": 90, "subsampling": 0}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True, "method": 0}),
}


def crop_of_whole(image: Image.Image, crop: ScaledCrop, how: Image.Resampling, fill: int) -> np.ndarray:
    """The plain way: scale the whole image, pad it, cut the square out."""
    scaled = np.asarray(image.resize((crop.width, crop.height), how))
    square = np.full((crop.size, crop.size, *scaled.shape[2:]), fill, np.uint8)
    part = scaled[crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
    square[: part.shape[0], : part.shape[1]] = part
    return square[:, ::-1] if crop.mirrored else square


@pytest.mark.parametrize("kernel", ["torch", "Pillow"])
@pytest.mark.parametrize("kind", FILES)
def test_a_scaled_crop_shows_the_pixels_of_the_whole_scaled_image(kind, kernel, monkeypatch):
    monkeypatch.setattr(crops, "_TORCH_GAIN", {"torch": 1e9, "Pillow": 0}[kernel])
    for seed, photo in enumerate(photographs().values()):
        photo = photo.resize((301 + seed, 207))
        image = open_image(data := encoded(photo, FILES[kind][0], **FILES[kind][1]))
        whole = Image.open(io.BytesIO(data)).convert("RGB")
        for scales in ((0.5, 0.6), (1.0, 1.02), (1.7, 2.0)):
            crop = draw_scaled_crop(np.random.default_rng(seed), 207, 301 + seed, 160, scales)
            expected = crop_of_whole(whole, crop, Image.Resampling.BICUBIC, 0)
            difference = np.abs(crop.of_image(image).astype(int) - expected)
            assert difference.max() <= 2
            assert (difference > 1).mean() < 1e-4
            assert difference.mean() < 0.05


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.integers(1, 40), seed=st.integers(0, 999))
def test_a_scaled_crop_shows_the_values_of_the_whole_scaled_target(height, width, size, seed):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 255, (height, width), dtype=np.uint8)
    crop = draw_scaled_crop(rng, height, width, size, (0.5, 2.0))
    expected = crop_of_whole(Image.fromarray(mask), crop, Image.Resampling.NEAREST, 255)
    np.testing.assert_array_equal(crop.of_target(raster_of(mask), 255), expected)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.integers(1, 40), seed=st.integers(0, 999))
def test_scaled_crops_of_any_image_are_whole(height, width, size, seed):
    """Every pixel comes from the image or is padding: no kernel may stop short of the square."""
    image = raster_of(np.full((height, width, 3), 200, np.uint8))
    crop = draw_scaled_crop(np.random.default_rng(seed), height, width, size, (0.5, 2.0))
    square = crop.of_image(image)[:, :: -1 if crop.mirrored else 1]
    rows, columns = crop.shown
    assert (square[:rows, :columns] == 200).all()
    assert not square[rows:].any()
    assert not square[:, columns:].any()


ARRAYS = {
    "RGB": np.asarray(noise(31, 23)),
    "gray": np.asarray(noise(31, 23))[..., 0],
    "16 bit": np.asarray(noise(31, 23))[..., 0].astype(np.uint16) * 257 + 3,
    "steps": np.arange(23 * 31, dtype=np.uint16).reshape(23, 31),
}


@pytest.mark.parametrize("decoder", ["OpenCV", "Pillow"])
@pytest.mark.parametrize("writer", ["OpenCV", "Pillow"])
@pytest.mark.parametrize("name", ARRAYS)
def test_corners_of_pngs_hold_the_pixels_that_were_written(name, writer, decoder, monkeypatch):
    monkeypatch.setattr(png, "_opencv", lambda: cv2 if decoder == "OpenCV" else None)
    array = ARRAYS[name]
    if writer == "Pillow":
        data = encoded(Image.fromarray(array), "PNG")
    else:
        data = cv2.imencode(".png", array[..., ::-1] if array.ndim == 3 else array)[1].tobytes()
    for right, bottom in ((31, 23), (1, 1), (7, 20), (31, 2)):
        corner = png.decode_corner(data, png.read_header(data), right, bottom)
        np.testing.assert_array_equal(corner, array[:bottom, :right])
        assert corner.dtype == array.dtype


def test_damage_in_a_chunk_that_is_read_is_noticed():
    data = bytearray(encoded(noise(64, 64), "PNG"))
    data[-100] ^= 1  # in the last rows
    with pytest.raises(DamagedDataError):
        open_image(bytes(data)).decode((3, 5, 20, 10))


@pytest.mark.parametrize("damage", ["cut", "checksum", "filter", "empty"])
@pytest.mark.parametrize("open_target", [open_mask, lambda path: open_depth(path, 256)])
def test_a_damaged_target_is_an_error_that_names_the_file(tmp_path, damage, open_target):
    values = ARRAYS["gray" if open_target is open_mask else "16 bit"]
    data = bytearray(encoded(Image.fromarray(values), "PNG"))
    at = data.index(b"IDAT")
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "checksum":
        data[at + 30] ^= 255
    else:
        row = b"\x09" + bytes(values.itemsize * 31)
        stream = zlib.compress(row * (23 if damage == "filter" else 3))
        chunk = b"IDAT" + stream
        data = data[: at - 4] + struct.pack(">I", len(stream)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "target.png").write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"target\.png is not usable"):
        open_target(tmp_path / "target.png").whole()


def test_the_size_is_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(png, "_inflate", lambda *args: pytest.fail("inflated"))
    side = int(MAX_PIXELS**0.5) + 1
    for values in (ARRAYS["RGB"], ARRAYS["gray"], ARRAYS["16 bit"]):
        data = bytearray(encoded(Image.fromarray(values), "PNG"))
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        (tmp_path / "huge.png").write_bytes(data)
        opens = (lambda path: open_image(path.read_bytes()), open_mask, lambda path: open_depth(path, 1))
        for open_file in opens:
            with pytest.raises(DamagedDataError, match=f"{side} x {side} pixels, more than|pixel format"):
                open_file(tmp_path / "huge.png")


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("upright", [False, True])
def test_boxes_lie_over_the_pixels_that_decoding_the_whole_gives(format, upright):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(40, 30), format, exif=exif)
    raster, whole = open_image(data, upright), np.asarray(decoding.decode(data, upright))
    assert (raster.height, raster.width) == whole.shape[:2]
    part = raster.inside((5, 4, 20, 22)).decode((2, 3, 9, 8))
    assert np.abs(part.astype(int) - whole[7:15, 7:16]).max() <= 1


def test_transparent_and_palette_pngs_are_laid_out_as_decoded_whole():
    rgb = noise(20, 20)
    files = [
        encoded(rgb.convert("P"), "PNG"),
        encoded(rgb.convert("RGBA"), "PNG"),
        encoded(rgb, "PNG", transparency=rgb.getpixel((0, 0))),
        encoded(rgb.convert("L"), "PNG"),
    ]
    for data in files:
        np.testing.assert_array_equal(open_image(data).whole(), np.asarray(decoding.decode(data)))
