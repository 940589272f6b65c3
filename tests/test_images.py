"""Pixels: faithful crops, every color mode, hostile bytes."""

import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import encoded, noise, photographs, png, stream_of, write_tars
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tvf

from pixio.images import decoding, jpeg, normalization
from pixio.images.crops import crop_box, decode_crop, random_resized_crop, resize_center_crop, whole_box
from pixio.images.decoding import DamagedDataError, decode
from pixio.images.normalization import denormalize, normalize


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (1200, 100), (64, 900)])
def test_crop_boxes_are_distributed_as_torchvisions(width, height):
    draws, rng = 3000, np.random.default_rng(0)
    ours = np.array([crop_box(rng, width, height, (0.2, 1.0)) for _ in range(draws)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(draws)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in theirs])
    for mine, other in zip(ours.T, theirs.T, strict=True):
        grid = np.union1d(mine, other)
        cdfs = [np.searchsorted(np.sort(values), grid, "right") / draws for values in (mine, other)]
        assert np.abs(cdfs[0] - cdfs[1]).max() < 1.95 * math.sqrt(2 / draws)  # Kolmogorov-Smirnov, p = 0.001


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9))
def test_crop_boxes_lie_inside_the_image(width, height, seed):
    left, top, w, h = crop_box(np.random.default_rng(seed), width, height, (0.2, 1.0))
    assert 0 <= left < left + w <= width
    assert 0 <= top < top + h <= height


def test_crop_equals_torchvisions_for_the_same_box():
    image = noise(90, 70)
    for seed in range(10):
        left, top, width, height = crop_box(np.random.default_rng(seed), 90, 70, (0.2, 1.0))
        expected = tvf.resized_crop(image, top, left, height, width, [32, 32], InterpolationMode.BICUBIC)
        ours = random_resized_crop(image, np.random.default_rng(seed), 32, (0.2, 1.0))
        assert torch.equal(ours, tvf.pil_to_tensor(expected))


@pytest.mark.parametrize(("width", "height"), [(90, 70), (61, 127), (40, 40)])
def test_central_crop_equals_torchvisions(width, height):
    image = noise(width, height)
    expected = tvf.center_crop(tvf.resize(image, 48, InterpolationMode.BICUBIC), [40, 40])
    assert torch.equal(resize_center_crop(image, 48, 40), tvf.pil_to_tensor(expected))


def test_central_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match=r"64 px.*48 px"):
        resize_center_crop(noise(90, 70), 48, 64)


def test_central_crop_of_a_strip_too_thin_to_be_resized_is_refused():
    with pytest.raises(DamagedDataError, match="256 x 5120000 pixels, more than"):
        resize_center_crop(Image.new("RGB", (1, 20_000)), 256, 256)


def test_normalize_matches_torchvision_and_is_undone():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = tvf.normalize(images.float() / 255, normalization.IMAGENET_MEAN, normalization.IMAGENET_STD)
    torch.testing.assert_close(normalize(images), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(denormalize(normalize(images)), images)
    with pytest.raises(ValueError, match=r"float32"):
        normalize(images.float())


def test_every_color_mode_becomes_rgb():
    gray = Image.fromarray(np.full((4, 4), 100, np.uint8))
    deep = Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).quantize()
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    cases = [
        (encoded(gray, "png"), (100, 100, 100)),
        (encoded(gray, "jpeg"), (100, 100, 100)),
        (encoded(gray.point(lambda v: 255, "1"), "png"), (255, 255, 255)),
        (encoded(deep, "png"), (100, 100, 100)),
        (encoded(palette, "png"), (10, 200, 30)),
        (encoded(palette, "png", transparency=0), (255, 255, 255)),
        (encoded(clear, "png"), (255, 255, 255)),
        (encoded(clear, "webp", lossless=True), (255, 255, 255)),
        (encoded(half, "png"), (127, 127, 127)),
        (encoded(cmyk, "jpeg"), (255, 0, 0)),
    ]
    for data, color in cases:
        image = decode(data)
        assert image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image)[1, 1], color, atol=3)


def both_ways(data: bytes, size: int, seed: int) -> list[torch.Tensor]:
    """A random crop as decoded by default and by reference."""
    ways = []
    for exact in (False, True):
        choose = partial(crop_box, np.random.default_rng(seed), scale=(0.2, 1.0))
        ways.append(decode_crop(data, size, choose, exact).int())
    return ways


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("options", [{"quality": 75}, {"quality": 95}, {"quality": 85, "progressive": True}])
def test_fast_crops_of_photographs_are_within_two_levels_of_exact_ones(size, options):
    for name, image in photographs().items():
        data = encoded(image, "jpeg", **options)
        for seed in range(4):
            fast, exact = both_ways(data, size, seed)
            assert (fast - exact).abs().float().mean() <= 2, (name, seed)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_fast_crops_of_other_formats_are_resized_alike(format):
    data = encoded(photographs()["coffee"], format)
    for size in (16, 64, 256):
        fast, exact = both_ways(data, size, seed=0)
        assert (fast - exact).abs().float().mean() < 0.5


def test_exact_crop_equals_torchvisions_of_the_whole_image():
    data = encoded(noise(90, 70), "jpeg", quality=95)
    left, top, width, height = crop_box(np.random.default_rng(5), 90, 70, (0.2, 1.0))
    whole = Image.open(io.BytesIO(data))
    expected = tvf.resized_crop(whole, top, left, height, width, [32, 32], InterpolationMode.BICUBIC)
    assert torch.equal(both_ways(data, 32, seed=5)[1], tvf.pil_to_tensor(expected).int())


@pytest.mark.parametrize("backend", ["simplejpeg", "Pillow"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 1}, {"restart_marker_rows": 1}]
)
def test_rows_above_the_bottom_are_those_of_the_whole_image(monkeypatch, backend, options):
    if backend == "Pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    gray = noise(20, 15).convert("L").convert("RGB").resize((301, 227))  # no chroma to interpolate
    data = encoded(gray, "jpeg", quality=85, **options)
    frame = jpeg.read_frame(data)
    assert (frame.width, frame.height, frame.baseline) == (301, 227, "progressive" not in options)
    whole = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    rows = jpeg.decode_rows(data, frame, 101, 1)
    height = -(-101 // frame.unit) * frame.unit if frame.baseline else 227
    assert frame.unit == (8 if "subsampling" in options else 16)
    assert rows.shape == (height, 301, 3)
    np.testing.assert_allclose(rows[:101], whole[:101], atol=1)
    assert jpeg.decode_rows(data, frame, 101, 4).shape == (-(-height // 4), 76, 3)


def test_without_simplejpeg_pillow_steps_in_with_a_note(tmp_path, monkeypatch):
    write_tars(tmp_path, [2])
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    with pytest.warns(UserWarning, match="pip install simplejpeg"):
        stream_of(tmp_path)
    fast, exact = both_ways(encoded(photographs()["rocket"], "jpeg"), 64, seed=1)
    assert (fast - exact).abs().float().mean() <= 2


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_images_are_turned_upright(format):
    upright = Image.new("RGB", (32, 16), "red")
    upright.paste("blue", (16, 0, 32, 16))
    turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    for tag, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        data = encoded(upright.transpose(turn), format, exif=exif)
        assert decoding.read_size(data) == (32, 16)
        pixels = np.asarray(decode(data))
        np.testing.assert_allclose(pixels[8, [4, 28]], [(255, 0, 0), (0, 0, 255)], atol=8)
        crop = decode_crop(data, 8, lambda width, height: (0, 0, width // 2, height))
        assert crop[0].min() > 200 > 60 > crop[2].max()


@pytest.mark.parametrize("tag", [0, 9, 200])
def test_an_orientation_that_exif_does_not_define_turns_nothing(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    data = encoded(Image.new("RGB", (32, 16), "red"), "jpeg", exif=exif)
    assert decoding.read_turn(data) == 1
    assert decoding.read_size(data) == decode(data).size == (32, 16)


def test_unreadable_metadata_costs_no_image():
    data = encoded(Image.new("RGB", (32, 16), "red"), "jpeg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data).size == (32, 16)
    assert decode_crop(data, 8, lambda width, height: (0, 0, width, height)).shape == (3, 8, 8)


def test_large_color_profiles_and_texts_of_a_png_cost_no_image():
    text = PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    data = encoded(noise(20, 10), "png", icc_profile=bytes(3_000_000), pnginfo=text)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(noise(20, 10)))
    assert decoding.read_size(data) == (20, 10)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_jpeg_that_lacks_only_its_end_marker_is_an_image(options):
    data = encoded(noise(70, 90), "jpeg", **options)
    for missing in (1, 2):
        assert np.array_equal(np.asarray(decode(data[:-missing])), np.asarray(decode(data)))
        crops = [decode_crop(cut, 16, whole_box) for cut in (data, data[:-missing])]
        assert (crops[0].int() - crops[1].int()).abs().float().mean() <= 2
    for missing in (3, 4, 10, 100):
        with pytest.raises(DamagedDataError):
            decode(data[:-missing])


@pytest.mark.parametrize("format", ["png", "webp"])
def test_animations_give_their_first_frame(format):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[3, 3].tolist() == pytest.approx([255, 0, 0], abs=8)


def test_jpeg_cut_off_below_the_crop_is_damaged():
    whole = encoded(photographs()["coffee"], "jpeg")
    for end in (len(whole) // 2, len(whole) - 20):
        with pytest.raises(DamagedDataError):
            decode_crop(whole[:end], 32, lambda width, height: (0, 0, 64, 64))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=40))
def test_no_bytes_make_decoding_fail_otherwise(at, patch):
    data = bytearray(encoded(noise(40, 30), "jpeg"))
    at %= len(data)
    data[at : at + len(patch)] = patch
    try:
        crop = decode_crop(bytes(data), 8, lambda width, height: (0, 0, width, height))
    except DamagedDataError:
        return
    assert crop.shape == (3, 8, 8)


def test_damaged_bytes_raise_one_error():
    whole = encoded(noise(64, 64), "jpeg")
    for data in (b"", b"GIF89a", whole[: len(whole) // 2], png(3)[:50], encoded(noise(8, 8), "bmp")):
        with pytest.raises(DamagedDataError):
            decode(data)


def test_too_many_pixels_are_refused_from_the_header(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 99)
    monkeypatch.setattr(decoding, "to_rgb", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr(jpeg, "decode_rows", lambda *args: pytest.fail("decoded"))
    data = encoded(noise(10, 10), "jpeg")
    for read in (decode, decoding.read_size, lambda data: decode_crop(data, 4, lambda w, h: (0, 0, w, h))):
        with pytest.raises(DamagedDataError, match=r"10 x 10 pixels, more than the 99 allowed"):
            read(data)
