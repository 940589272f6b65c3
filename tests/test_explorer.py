"""The page of `pixio explore`, in a real browser: what it shows is what Python computes."""

import numpy as np
import pytest
import torch
from chromium import Page
from image_sets import noise
from PIL import Image

import pixio
from pixio.cli.explorer_page import View, view, write_page
from pixio.cli.main import main
from pixio.features import pca_colors, reduce_features, similarity
from pixio.images.inference import Transform
from pixio.synthetic.scenes import render

BLOCKS = [1, 3]
ROUNDING = 0.02  # of a cosine similarity, by scores of 8 bits
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of two photographs that the command wrote, and what it is made of."""
    root = tmp_path_factory.mktemp("explorer")
    files = []
    for seed, size in ((1, (96, 128)), (2, (112, 80))):
        files.append(str(root / f"scene {seed}.png"))
        Image.fromarray(render(seed, size).image).save(files[-1])
    torch.manual_seed(0)
    encoder = pixio.pixio_vitfemto16(img_size=64).eval()
    torch.save(encoder.state_dict(), root / "encoder.pth")
    page = root / "explore.html"
    flags = ["--blocks", *map(str, BLOCKS), "--device", "cpu", "--size", "128", "--output", str(page)]
    main(["explore", *files, "--pretrained", str(root / "encoder.pth"), *flags])
    transform = Transform(128, "resize", 16)
    return page, [view(encoder, file, transform, BLOCKS) for file in files]


@pytest.fixture(scope="module")
def opened(written, tmp_path_factory):
    with Page(written[0], 1000, 800, tmp_path_factory.mktemp("profile")) as page:
        page.wait_for("explorer.images.every(image => image.photo.complete)")
        yield page
        assert page.problems == []


@pytest.fixture
def page(opened):
    """The open page as it was when it was opened."""
    opened.resize(1000, 800)
    opened.set_scheme(False)
    opened.evaluate(
        "Object.assign(explorer.state, {mode: 'similarity', block: 1, token: 0, opacity: 70, smooth: true, "
        "centered: false, pinned: true, pointed: null, query: {image: 0, row: 0, column: 0}}); "
        "scrollTo(0, 0); explorer.refresh()"
    )
    opened.settle()
    return opened


def center_of(page: Page, image: int, row: int, column: int) -> tuple[float, float]:
    """Where on the screen a patch is."""
    left, top, width, height, rows, columns = page.evaluate(
        f"(i => {{ const box = i.canvas.getBoundingClientRect(); "
        f"return [box.left, box.top, box.width, box.height, i.rows, i.columns]; }})(explorer.images[{image}])"
    )
    return left + (column + 0.5) * width / columns, top + (row + 0.5) * height / rows


def maps(page: Page) -> list[np.ndarray]:
    return [np.array(values) for values in page.evaluate("explorer.values().map(map => [...map])")]


def picture(page: Page, image: int) -> str:
    return page.evaluate(f"explorer.images[{image}].canvas.toDataURL()")


# --- in the browser -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_click_shows_the_similarity_to_that_patch_in_all_photographs(page, written):
    _, views = written
    before = picture(page, 0), picture(page, 1)
    page.click(*center_of(page, 1, row=2, column=3))
    assert page.evaluate("explorer.state.query") == {"image": 1, "row": 2, "column": 3}
    assert all(now != old for now, old in zip((picture(page, 0), picture(page, 1)), before, strict=True))
    query = views[1].patches[1][:, 2, 3][None]
    for found, one in zip(maps(page), views, strict=True):
        expected = similarity(query, one.patches[1]).flatten().numpy()
        np.testing.assert_allclose(found, expected, atol=ROUNDING)
    assert maps(page)[1].reshape(8, 6)[2, 3] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_blocks_are_chosen_by_their_buttons(page, written):
    x, y = page.evaluate(
        "(box => [box.x + box.width / 2, box.y + box.height / 2])"
        "(document.querySelector('#blocks button').getBoundingClientRect())"
    )
    page.click(x, y)
    assert page.evaluate("document.querySelector('#blocks [aria-pressed=true]').textContent") == "1"
    first = written[1][0].patches[0]
    expected = similarity(first[:, 0, 0][None], first).flatten().numpy()
    np.testing.assert_allclose(maps(page)[0], expected, atol=ROUNDING)


@pytest.mark.slow
def test_hovering_follows_only_once_the_patch_is_let_go(page):
    page.mouse("mouseMoved", *center_of(page, 0, row=4, column=4))
    assert page.evaluate("explorer.state.query") == {"image": 0, "row": 0, "column": 0}
    shown = page.evaluate("explorer.images[0].note.textContent")
    assert shown == f"row 4, column 4: {maps(page)[0].reshape(6, 8)[4, 4]:.3f}"
    page.press("Escape")
    page.mouse("mouseMoved", *center_of(page, 0, row=3, column=5))
    assert page.evaluate("explorer.state.query") == {"image": 0, "row": 3, "column": 5}


@pytest.mark.slow
def test_a_touch_chooses_a_patch(page):
    x, y = center_of(page, 1, row=1, column=1)
    page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.wait_for("explorer.state.query.image === 1")
    assert page.evaluate("explorer.state.query") == {"image": 1, "row": 1, "column": 1}


@pytest.mark.slow
@pytest.mark.parametrize("token", [0, 8])
def test_class_tokens_are_compared_with_the_patches_of_their_own_photograph(page, written, token):
    page.press(str(token + 1))
    assert page.evaluate("explorer.state.mode") == "tokens"
    for found, one in zip(maps(page), written[1], strict=True):
        tokens = torch.cat([one.tokens[1], one.tokens[1].mean(0, keepdim=True)])
        expected = similarity(tokens[token][None], one.patches[1]).flatten().numpy()
        np.testing.assert_allclose(found, expected, atol=ROUNDING)


@pytest.mark.slow
def test_centered_similarities_are_those_of_features_without_their_mean(page, written):
    page.press("c")
    features = [one.patches[1] for one in written[1]]
    mean = torch.cat([feature.flatten(1) for feature in features], dim=1).mean(1)[:, None, None]
    centered = [feature - mean for feature in features]
    for found, one in zip(maps(page), centered, strict=True):
        expected = similarity(centered[0][:, 0, 0][None], one).flatten().numpy()
        np.testing.assert_allclose(found, expected, atol=2 * ROUNDING)


@pytest.mark.slow
def test_pca_has_the_colors_of_pixio_pca(page, written):
    page.press("p")
    found = np.array(page.evaluate("[...explorer.pcaColors()]")).reshape(-1, 3)
    colors = pca_colors([one.patches[1] for one in written[1]]).maps
    expected = torch.cat([map_.flatten(1).T for map_ in colors]).numpy() * 255
    assert np.abs(found - expected).max() <= 8
    assert page.evaluate("document.getElementById('scale').hidden")


@pytest.mark.slow
def test_keys_move_the_patch_and_change_opacity_smoothness_and_block(page):
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
        page.press(key)
    assert page.evaluate("explorer.state.query") == {"image": 0, "row": 1, "column": 1}
    before = picture(page, 0)
    page.press("-")
    assert page.evaluate("explorer.state.opacity") == 65
    paler = picture(page, 0)
    page.press("i")
    assert len({before, paler, picture(page, 0)}) == 3
    page.press("]")
    assert page.evaluate("explorer.state.block") == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["s", "t", "p"])
def test_a_window_of_400_pixels_shows_everything_without_scrolling_sideways(page, mode):
    page.resize(400, 800)
    page.press(mode)
    assert page.evaluate(OVERFLOW) == 0
    boxes = page.evaluate(
        "[...document.querySelectorAll('button, figure, input')].map(e => e.getBoundingClientRect())"
        ".filter(box => box.width).map(box => [box.left, box.right])"
    )
    assert len(boxes) > 8
    assert all(0 <= left < right <= 400 for left, right in boxes)
    assert page.evaluate("explorer.images[0].canvas.getBoundingClientRect().width") > 350


@pytest.mark.slow
def test_colors_of_the_page_follow_the_scheme_of_the_system(page):
    color = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(color)
    page.set_scheme(True)
    assert light == "rgb(246, 246, 244)"
    assert page.evaluate(color) == "rgb(19, 19, 22)"


# --- the file -----------------------------------------------------------------------------------------------


def test_eight_photographs_of_512_pixels_and_four_blocks_stay_below_ten_megabytes(tmp_path):
    views = [
        View(
            f"</script>{i}",
            torch.from_numpy(np.array(noise(512, 512))).permute(2, 0, 1),
            [torch.randn(80, 32, 32) for _ in range(4)],
            [torch.randn(8, 80) for _ in range(4)],
        )
        for i in range(8)
    ]
    size = write_page(tmp_path / "page.html", views, [2, 5, 8, 11], "a < b", 16)
    assert size == (tmp_path / "page.html").stat().st_size < 10_000_000
    text = (tmp_path / "page.html").read_text()
    assert text.count("</script>") == 2
    assert "<h1>a &lt; b</h1>" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


def test_reduced_features_are_those_of_a_pca_and_lose_only_the_rest():
    torch.manual_seed(0)
    features = [torch.randn(6, 3, 4), torch.randn(6, 5, 2)]
    patches = torch.cat([feature.flatten(1).T for feature in features])
    whole = reduce_features(features, 64)
    assert whole.scores.shape == (22, 6)
    assert whole.explained == pytest.approx(1)
    torch.testing.assert_close(whole.scores @ whole.loadings.T + whole.mean, patches)
    part = reduce_features(features, 2)
    variances = torch.linalg.eigvalsh(patches.T.cov(correction=0)).flip(0)
    torch.testing.assert_close(part.scores.var(0, correction=0), variances[:2])
