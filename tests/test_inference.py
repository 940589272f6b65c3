"""Images into the encoder, and maps back to their pixels."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import pixio
from pixio.images.inference import FITS, Transform
from pixio.images.normalization import normalize

SIDES = st.integers(1, 200)


def photo(height, width, seed=0):
    """Smooth colors, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def path(tmp_path):
    Image.fromarray(photo(40, 64)).save(tmp_path / "0.png")
    return tmp_path / "0.png"


def test_a_square_is_what_the_released_models_were_evaluated_on(path):
    with Image.open(path) as image:
        resized = np.array(image.resize((48, 48), Image.Resampling.BICUBIC))
    expected = normalize(torch.from_numpy(resized).permute(2, 0, 1))
    torch.testing.assert_close(pixio.transform(48)(path), expected)


def test_transform_of_a_data_set_gives_batches_without_another_dimension(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        Image.fromarray(photo(30, 50)).save(tmp_path / label / "0.png")
    data = ImageFolder(tmp_path, transform=pixio.transform(32))
    images, _ = next(iter(DataLoader(data, batch_size=2)))
    assert images.shape == (2, 3, 32, 32)
    model = pixio.create_model("pixio_vitfemto16").eval()
    with torch.inference_mode():
        one = model.forward_features(pixio.transform(32)(tmp_path / "a" / "0.png"))
        two = model.forward_features(images)
    torch.testing.assert_close(one["patch_tokens_norm"], two["patch_tokens_norm"][:1])


def test_file_bytes_image_and_array_are_the_same_input(path):
    prepare = pixio.transform(32)
    expected = prepare(path)
    for source in (str(path), path.read_bytes(), Image.open(path), np.asarray(Image.open(path))):
        torch.testing.assert_close(prepare(source), expected, rtol=0, atol=0)


def test_padding_keeps_the_pixels_and_adds_nearly_nothing_right_and_below():
    pixels = photo(40, 50)
    image, placement = Transform(None, "pad").placed(pixels)
    assert image.shape == (3, 48, 64)
    kept = normalize(torch.from_numpy(pixels).permute(2, 0, 1))
    torch.testing.assert_close(image[:, :40, :50], kept, rtol=0, atol=0)
    image[:, :40, :50] = 0
    assert image.abs().max() < 0.01
    assert placement.shown == (40, 50)


@given(SIDES, SIDES, st.sampled_from(FITS), st.sampled_from([None, 16, 50, 96]), st.sampled_from([8, 16]))
def test_every_input_is_whole_patches_that_all_show_the_image(height, width, fit, size, patch):
    if fit == "square":
        size = 96
    placement = Transform(size, fit, patch).placement(height, width)
    for shown, padded in zip(placement.shown, placement.padded, strict=True):
        assert padded % patch == 0
        assert 0 <= padded - shown < patch
        assert fit == "pad" or shown == padded
    if size and fit == "pad":
        assert max(placement.shown) == size


@given(SIDES, SIDES, st.sampled_from(FITS), st.data())
def test_a_point_lies_in_the_patch_whose_label_its_pixel_gets_back(height, width, fit, data):
    placement = Transform(64, fit).placement(height, width)
    rows, columns = (side // 16 for side in placement.padded)
    labels = torch.arange(rows * columns).view(1, 1, rows, columns)
    back = placement.to_original(labels, "nearest")
    assert back.shape == (1, 1, height, width)
    assert back.dtype == labels.dtype
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    row, column = placement.patch_at(x + 0.5, y + 0.5)
    edges = [(x + 0.5) / width * placement.shown[1] / 16, (y + 0.5) / height * placement.shown[0] / 16]
    if all(abs(edge - round(edge)) > 1e-4 for edge in edges):
        assert back[0, 0, y, x] == row * columns + column


@pytest.mark.parametrize("fit", FITS)
def test_an_image_mapped_back_is_the_image(fit):
    pixels = photo(90, 70)
    prepared, placement = Transform(128, fit).pixels(pixels)
    back = placement.to_original(prepared[None].float())[0].permute(1, 2, 0)
    assert (back - torch.from_numpy(pixels).float()).abs().mean() < 2


def test_a_map_can_be_had_at_another_size_of_the_original():
    placement = Transform(None, "pad").placement(40, 50)
    ramp = torch.arange(48.0)[None, None, :, None].expand(-1, -1, -1, 64)
    halved = placement.to_original(ramp, size=(20, 25))
    torch.testing.assert_close(halved[0, 0, :, 0], torch.arange(20) * 2 + 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pixio.transform(100), "100 is not a multiple of the patch size 16: try 96"),
        (lambda: pixio.transform(None), "needs a size"),
        (lambda: pixio.transform(0, "pad"), "not a positive number"),
        (lambda: pixio.transform(64, "stretch"), "choose one of square, resize, pad"),
        (lambda: pixio.transform(64)(np.zeros((4, 4, 3))), "float64"),
        (lambda: pixio.transform(64)(np.zeros((4, 4, 4), np.uint8)), r"\[4, 4, 4\]"),
        (lambda: pixio.transform(64)(np.zeros((0, 4, 3), np.uint8)), "image of 0 x 4 pixels"),
        (lambda: pixio.transform(64)(b"nothing"), "not a JPEG"),
        (lambda: Transform(64).placement(10, 20).patch_at(20, 3), "x is below 20, y below 10"),
    ],
)
def test_an_impossible_input_is_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_pillow_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        pixio.transform(64)("photo.png")
