"""What the pictures show is right, and they are drawn whatever names and logs hold."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ALONE
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA

import pixio
from pixio.cli import curves, drawing
from pixio.cli.report import write_report
from pixio.engine.checkpoint import Checkpoints
from pixio.features.pca import pca_colors, similarity
from pixio.images import figures
from pixio.images.inference import Transform
from pixio.models.mae import MAEOutput, patch_statistics, patchify


@pytest.fixture(scope="module")
def mae():
    torch.manual_seed(0)
    encoder = pixio.PixioViT(img_size=32, embed_dim=16, depth=1, num_heads=2)
    return pixio.PixioMAE(encoder, 16, 1, 2, mask_grid=1).eval()


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def features(*sizes, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -1, width)[:, None, None]
    return [torch.randn(width, h, w, generator=generator) * scales for h, w in sizes]


# ---------------------------------------------------------------------------------------------------- maps
def test_pca_colors_are_the_first_three_components_of_all_images_together():
    maps = features((5, 7), (8, 4))
    colors = pca_colors(maps)
    patches = torch.cat([m.flatten(1).T for m in maps]).numpy()
    oracle = PCA(3).fit(patches)
    assert colors.explained == pytest.approx(oracle.explained_variance_ratio_.sum(), rel=1e-4)
    found = torch.cat([m.flatten(1).T for m in colors.maps]).numpy()
    for ours, theirs in zip(found.T, oracle.transform(patches).T, strict=True):
        inner = (ours > 0) & (ours < 1)  # the others are clipped
        assert inner.mean() > 0.9
        assert abs(np.corrcoef(ours[inner], theirs[inner])[0, 1]) > 0.9999
    assert [tuple(m.shape) for m in colors.maps] == [(3, 5, 7), (3, 8, 4)]


def test_a_patch_has_its_color_whichever_image_it_is_in():
    first, second = features((6, 6), (6, 6))
    second[:, 2, 3] = first[:, 4, 1]
    colors = pca_colors([first, second]).maps
    torch.testing.assert_close(colors[0][:, 4, 1], colors[1][:, 2, 3])


@pytest.mark.parametrize("sign", [-1, 1])
def test_foreground_is_what_differs_most_and_keeps_off_the_border(sign):
    maps = features((8, 8), (9, 7))
    inside = [torch.zeros(m.shape[1:], dtype=torch.bool) for m in maps]
    for m, place in zip(maps, inside, strict=True):
        place[2:6, 2:5] = True
        m[3, place] += sign * 60.0
    colors = pca_colors(maps, foreground=True)
    assert all(torch.equal(found, place) for found, place in zip(colors.foreground, inside, strict=True))
    assert all(place.all() for place in pca_colors(maps).foreground)


def test_too_few_patches_for_a_pca_are_explained():
    with pytest.raises(ValueError, match="3 patches are too few for 3 components"):
        pca_colors(features((1, 3)))


def test_similarity_is_the_cosine_of_each_token_and_patch():
    (patches,), tokens = features((3, 5)), torch.randn(4, 12)
    expected = F.cosine_similarity(tokens[:, :, None, None], patches[None], dim=1)
    torch.testing.assert_close(similarity(tokens, patches), expected)


def test_the_similarity_picture_compares_the_patch_under_the_point(mae):
    photo = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    seen = drawing.look(mae.encoder, photo, Transform(96, "resize"))
    found = drawing.similarity_panels([seen], [seen.patches_at([(70.0, 20.0)])], "point")["point 1"][0]
    assert found.shape == (60, 90)
    assert found[20, 70] == pytest.approx(1, abs=1e-5)
    assert seen.on_photo([(70.0, 20.0)]) == [(70.0, 20.0)]


# ------------------------------------------------------------------------------------------- reconstruction
def test_a_perfect_prediction_reconstructs_the_image(mae, images, monkeypatch):
    def perfect(pixels, mask_ratio, noise):
        target = patchify(pixels, 16)
        mean, std = patch_statistics(target)
        normalized = (target - mean) / std
        return MAEOutput(torch.zeros(()), normalized, torch.ones(target.shape[:2]), target)

    monkeypatch.setattr(mae, "forward", perfect)
    panels = drawing.reconstruct(mae, images)
    assert (panels["reconstruction"].int() - images.int()).abs().max() <= 1
    assert (panels["masked"] == drawing.HIDDEN).all()


def test_visible_patches_are_pasted_untouched_and_masked_ones_are_gray(mae, images):
    noise = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    panels = drawing.reconstruct(mae, images, 0.75, noise)
    for image, corner in ((0, slice(0, 16)), (1, slice(16, 32))):
        visible = torch.zeros(32, 32, dtype=torch.bool)
        visible[corner, corner] = True
        for panel in ("masked", "pasted"):
            assert torch.equal(panels[panel][image][:, visible], images[image][:, visible])
        assert (panels["masked"][image][:, ~visible] == drawing.HIDDEN).all()
        predicted = panels["reconstruction"][image][:, ~visible]
        assert torch.equal(panels["pasted"][image][:, ~visible], predicted)


def test_draws_of_a_mask_differ_and_can_be_repeated(mae, images, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing, "save_sheet", lambda panels, path, names: drawn.append((panels, names)))
    for _ in range(2):
        drawing.save_reconstructions(mae, images, "x.png", 0.5, seed=3, draws=3, names=["a", "b"])
    (first, names), (second, _) = drawn
    assert names == ["a, draw 1", "a, draw 2", "a, draw 3", "b, draw 1", "b, draw 2", "b, draw 3"]
    assert all(torch.equal(first[name], second[name]) for name in drawing.PANELS)
    assert not torch.equal(first["masked"][0], first["masked"][1])


@pytest.mark.parametrize(("name", "side"), [("sweep.gif", 2), ("sweep.png", 3)])
def test_a_sweep_hides_cell_after_cell_and_brings_them_back(name, side, mae, tmp_path, monkeypatch):
    masked, save_sheet = [], drawing.save_sheet
    images = torch.randint(0, 128, (1, 3, 16 * side, 16 * side), dtype=torch.uint8)

    def note(panels, *arguments, **options):
        masked.append((panels["masked"] == drawing.HIDDEN).all(1))
        save_sheet(panels, *arguments, **options)

    monkeypatch.setattr(drawing, "save_sheet", note)
    drawing.save_sweep(mae, images, tmp_path / name, names=["a"])
    assert [m.sum().item() for m in masked] == [256 * cells for cells in range(side**2)]
    assert all((after | ~before).all() for before, after in itertools.pairwise(masked))
    with Image.open(tmp_path / name) as animation:
        assert animation.n_frames == 2 * side**2 - 2
        assert animation.info["loop"] == 0


# --------------------------------------------------------------------------------------------------- sheets
def test_a_sheet_holds_photographs_and_maps_of_any_shape_and_hostile_names(tmp_path):
    photos = [torch.zeros(3, 40, 60, dtype=torch.uint8), torch.full((3, 70, 30), 255, dtype=torch.uint8)]
    maps = [torch.rand(40, 60), torch.rand(70, 30)]
    sheet = {"image": photos, "$\\frac": maps}
    names = ["a$b", "<script>"]
    drawing.save_sheet(sheet, tmp_path / "sheet.png", names, scale="$", marks=[(3.0, 5.0)], title="_$")
    with Image.open(tmp_path / "sheet.png") as image:
        assert min(image.size) > 300
        assert np.asarray(image.convert("L")).std() > 10


@given(st.text(max_size=60), st.floats(0, 3))
def test_a_name_is_shortened_in_its_middle_to_the_row_beside_it(name, inches):
    shown = drawing._shorten(name, inches)
    room = max(inches / drawing._LETTER, 3)
    assert len(shown) <= room
    if len(name) <= int(room):
        assert shown == name
    else:
        start, end = shown.split("…") if shown.count("…") == 1 else (shown[:1], shown[-1:])
        assert end
        assert name.startswith(start)
        assert name.endswith(end)


def test_pictures_of_features_are_drawn_for_photographs_of_several_sizes(mae, tmp_path):
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((50, 80), (900, 60))]
    seen = [drawing.look(mae.encoder, photo, Transform(96, "pad")) for photo in photos]
    assert [tuple(one.photo.shape[1:]) for one in seen] == [(50, 80), (640, 43)]
    panels, explained = drawing.pca_panels(seen, foreground=True, smooth=True)
    assert 0 < explained <= 1
    drawing.save_sheet(panels, tmp_path / "pca.png")
    panels = drawing.similarity_panels(seen, [one.cls for one in seen], "token")
    drawing.save_sheet(panels, tmp_path / "tokens.pdf", names=["a", "b"])
    assert (tmp_path / "pca.png").stat().st_size > 1000
    assert (tmp_path / "tokens.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(("images", "wide"), [(1, True), (2, False), (4, True), (8, False)])
def test_images_stand_side_by_side_where_that_is_wider_and_fits_a_page(images, wide, tmp_path):
    photos = [torch.full((3, 32, 32), 40, dtype=torch.uint8)] * images
    names = [f"photo {i}" for i in range(images)]
    drawing.save_sheet({"image": photos, "map": photos}, tmp_path / "sheet.png", names)
    with Image.open(tmp_path / "sheet.png") as picture:
        width, height = picture.size
        dark = (np.asarray(picture.convert("L")) == 40).mean()
    assert (width > 1.3 * height) == wide
    assert dark > 0.7  # photographs fill the sheet


def test_a_png_of_a_figure_has_no_opacity_and_is_compressed_well(tmp_path):
    with figures.figure(tmp_path / "small.png", 2, 1) as drawn:
        drawn.subplots().imshow(np.random.default_rng(0).random((20, 20)))
    with Image.open(tmp_path / "small.png") as picture:
        assert picture.mode == "RGB"
        assert picture.size == (400, 200)
        picture.convert("RGBA").save(tmp_path / "plain.png")
    assert (tmp_path / "small.png").stat().st_size < 0.95 * (tmp_path / "plain.png").stat().st_size


# --------------------------------------------------------------------------------------------------- curves
def log(folder, losses, extra=""):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        json.dumps({"step": i + 1, "images": 8 * i, "loss": loss, "lr": 1e-3})
        for i, loss in enumerate(losses)
    ]
    (folder / "log.jsonl").write_text("\n".join(rows) + "\n" + extra)
    return folder


def test_curves_are_drawn_of_logs_with_gaps_and_unfinished_lines(tmp_path):
    first = log(tmp_path / "a_$run", [1.0, None, 0.5], '{"step": 4, "lo')
    second = log(tmp_path / "b", np.linspace(1, 0, 100).tolist())
    series = curves.read_log(first)
    np.testing.assert_array_equal(series["step"], [1, 2, 3])
    np.testing.assert_array_equal(series["loss"], [1, np.nan, 0.5])
    curves.save_curves([first, second / "log.jsonl"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_health_and_held_out_loss_are_drawn_over_the_points_of_an_expected_run(tmp_path):
    def row(step):
        health = {"variance": 0.5, "mean_square": 10.0 * step, "rank": 4.0}
        row = {"step": step, "loss": 1 / step, "lr": 0.1, "grad_norm": 1.0, "health": health}
        row["students"] = {"small": {"health": health}}
        return row | ({"held_out_loss": 0.5} if step % 50 == 0 else {})

    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(1, 101)))
    (tmp_path / "run/config.json").write_text(json.dumps({"lr": 0.1, "output_dir": str(tmp_path)}))
    curves.save_expected(tmp_path / "run", tmp_path / "expected.json")
    assert json.loads((tmp_path / "expected.json").read_text())["config"] == {"lr": 0.1}
    points = curves.read_expected(tmp_path / "expected.json")
    np.testing.assert_array_equal(points["step"], range(10, 101, 10))
    np.testing.assert_allclose(points["loss"][4], np.mean([1 / i for i in range(45, 56)]), rtol=1e-3)
    np.testing.assert_array_equal(points["health/mean_square"], 10 * points["step"])
    curves.save_curves([tmp_path / "run"], tmp_path / "curves.png", tmp_path / "expected.json")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    (tmp_path / "none.json").write_text('{"points": {"step": [1, 2], "loss": [1]}}')
    with pytest.raises(ValueError, match=r"none\.json holds no expected run"):
        curves.save_curves([tmp_path / "run"], tmp_path / "curves.png", tmp_path / "none.json")


@given(
    st.lists(st.one_of(st.floats(-5, 5), st.just(float("nan"))), min_size=4, max_size=30), st.integers(2, 4)
)
def test_a_moving_mean_is_the_mean_of_the_known_neighbours(values, window):
    found = curves._moving_mean(np.array(values), window)
    for i, mean in enumerate(found):
        known = [value for value in values[i : i + window] if value == value]
        assert mean == pytest.approx(np.mean(known) if known else 0, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no steps yet"),
        ('{"step": 1}\n', "is no log of a run"),
        ("[1]\n", "is no log of a run"),
        ("{\n", "is no log of a run"),
        ("[" * 100_000 + "\n", "is no log of a run"),
        (f'{{"step": {10**400}, "loss": 1, "lr": 1}}\n', "is no log of a run"),
    ],
)
def test_a_log_that_is_none_is_named(text, message, tmp_path):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"log\.jsonl.* {message}"):
        curves.save_curves([tmp_path], io.BytesIO())
    with pytest.raises(ValueError, match=rf"log\.jsonl.* {message}"):
        write_report(tmp_path, tmp_path / "report.html")


# --------------------------------------------------------------------------------------------------- report
@pytest.fixture
def run(tmp_path, mae):
    """A run with a checkpoint, an evaluation in it, one beside it, and one of another run."""
    run = log(tmp_path / "runs/<b>run", [1.0, 0.5])
    (run / "config.json").write_text(
        json.dumps({"data_path": "<script>alert(1)</script>", "mask_ratio": 0.5})
    )
    config = {"model": "tiny_enc16x1h2_dec16x1h2", "mask_grid": 1}
    checkpoints = Checkpoints(run / "checkpoints", ALONE)
    checkpoints.save(2, {"model": mae.state_dict(), "config": config})
    for folder, metric, encoder in (
        (run / "eval/voc", 11.25, None),
        (run.parent / "knn", 22.5, str(run / "encoder.pth")),
        (run.parent / "other", 33.75, str(run.parent / "other/encoder.pth")),
    ):
        folder.mkdir(parents=True)
        results = {"task": "<i>", "pretrained_ckp": encoder, "last": {"miou": metric}}
        (folder / "results.json").write_text(json.dumps(results))
    Image.new("RGB", (4, 4)).save(run / "eval/voc/panels.png")
    (run.parent / "knn/panels.png").write_bytes(b"<script>")
    return run


def test_a_report_holds_curves_reconstructions_settings_and_the_results_of_its_run(run, tmp_path):
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert "50 % of the cells masked" in page
    assert "<td>11.25</td>" in page
    assert "<td>22.5</td>" in page
    assert "33.75" not in page
    write_report(run, tmp_path / "report.html", results=[run.parent / "other"])
    assert "<td>33.75</td>" in (tmp_path / "report.html").read_text()


def test_the_figures_of_evaluations_stand_in_columns(run, tmp_path):
    best = {"miou": {"value": 12.5, "epoch": 4}}
    dense = {"task": "semseg", "last": {"epoch": 6, "miou": 11.25}, "best": best}
    (run / "eval/voc/results.json").write_text(json.dumps(dense))
    knn = {"pretrained_ckp": str(run / "encoder.pth"), "k": {"10": {"top1": 50.0, "top5": 75.0}}, "last": 3}
    (run.parent / "knn/results.json").write_text(json.dumps(knn))
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<tr><th></th><th>last</th><th>best</th><th>at epoch</th></tr>" in page
    assert "<tr><th>miou</th><td>11.25</td><td>12.5</td><td>4</td></tr>" in page
    assert "<tr><th>k = 10</th><td>50</td><td>75</td></tr>" in page


def test_what_lies_beside_a_run_and_cannot_be_read_keeps_nobody_from_a_report(run, tmp_path):
    (run.parent / "other/results.json").write_text("[]")
    write_report(run, tmp_path / "report.html")
    assert "<td>22.5</td>" in (tmp_path / "report.html").read_text()


def test_a_report_fits_narrow_and_dark_screens(run, tmp_path):
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width">' in page
    assert "prefers-color-scheme: dark" in page


def test_a_report_escapes_what_it_read_and_refers_to_nothing_outside(run, tmp_path):
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>run" not in page
    assert "<i>" not in page
    assert "http:" not in page
    assert "https:" not in page
    assert "default-src 'none'" in page


def test_a_report_of_a_run_without_decoder_or_configuration_says_so(run, mae, tmp_path):
    torch.save(mae.encoder.state_dict(), run / "checkpoints/encoder.pth")
    (run / "checkpoints/latest").write_text("encoder.pth")
    (run / "config.json").unlink()
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "has no decoder" in page
    assert "no config.json" in page


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "log.jsonl").unlink(), "is no run"),
        (
            lambda run: (run / "checkpoints/latest").write_text("../../secret.pt"),
            "not the name of a checkpoint",
        ),
        (lambda run: (run / "config.json").write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda run: (run / "config.json").write_text('{"mask_ratio": "half"}'), "from 0 to 1, found half"),
        (lambda run: (run / "eval/voc/results.json").write_text("[]"), "holds a list"),
    ],
)
def test_a_broken_run_is_explained(spoil, message, run, tmp_path):
    spoil(run)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_report(run, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_photographs_of_a_report_can_be_chosen(run, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        drawing,
        "save_reconstructions",
        lambda mae, images, file, ratio, names: (
            chosen.append((images, names)),
            Image.new("L", (1, 1)).save(file, "png"),
        ),
    )
    Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "gray.png")
    write_report(run, tmp_path / "report.html", images=[str(tmp_path / "gray.png")])
    ((images, names),) = chosen
    assert names == ["gray"]
    assert images.shape == (1, 3, 32, 32)
    assert (images == 9).all()
