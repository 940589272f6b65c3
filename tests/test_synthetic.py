"""Rendered scenes: exact geometry, labels, no shortcuts through color; and the trees written from them."""

import io
import json
import math
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data.readers import create_reader

from pixio.synthetic import layouts, scenes, trees
from pixio.synthetic.appearance import dress
from pixio.synthetic.layouts import KITTI_DEPTH_SCALE, LAYOUTS
from pixio.synthetic.scenes import CLASS_NAMES, LABEL_NAMES, label_of, render
from pixio.synthetic.trees import write_tree
from pixio.synthetic.world import Primitive, World, compose

# --------------------------------------------------------------------------- the scene


def signed_distance(primitive: Primitive, points: np.ndarray) -> np.ndarray:
    """Positive outside, about the distance near the surface [N]; float64 points [N, 3]."""
    x, y, z = (points - primitive.center).T
    along = math.cos(primitive.yaw) * x + math.sin(primitive.yaw) * y
    across = math.cos(primitive.yaw) * y - math.sin(primitive.yaw) * x
    radius, ring, half_height = primitive.half[0], np.hypot(x, y), primitive.half[2]
    if primitive.kind == "box":
        return np.maximum.reduce([abs(along) - radius, abs(across) - primitive.half[1], abs(z) - half_height])
    if primitive.kind == "sphere":
        return np.sqrt(x**2 + y**2 + z**2) - radius
    if primitive.kind == "cylinder":
        return np.maximum(ring - radius, abs(z) - half_height)
    slope = radius / (2 * half_height)
    return np.maximum((ring - slope * (half_height - z)) / math.hypot(1, slope), -half_height - z)


def surface_distances(world: World, points: np.ndarray) -> np.ndarray:
    """Distance to every class [7, N]: infinite for kinds that are absent."""
    distances = np.full((len(CLASS_NAMES), len(points)), np.inf)
    distances[0] = world.room[2] - points[:, 2]
    distances[1] = np.minimum(points[:, :2], world.room[:2] - points[:, :2]).min(1)
    distances[2] = points[:, 2]
    for primitive in world.primitives:
        row = CLASS_NAMES.index(primitive.kind)
        distances[row] = np.minimum(distances[row], signed_distance(primitive, points))
    return distances


def pixel_rays(world: World, height: int, width: int) -> np.ndarray:
    """Rays through pixel centers, 1 long along the optical axis [H * W, 3]."""
    half = math.tan(world.camera.field_of_view / 2)
    rows, columns = np.mgrid[:height, :width]
    side = max(height, width)
    right = half * (2 * columns + 1 - width) / side
    up = -half * (2 * rows + 1 - height) / side
    return (np.stack([right, up, np.ones_like(up)], -1) @ world.camera.axes).reshape(-1, 3)


def test_a_seed_gives_one_scene():
    first, again, other = render(7, 48), render(7, 48), render(8, 48)
    for name in ("image", "depth", "semantics"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert (getattr(first, name) != getattr(other, name)).any()


def test_arrays_have_the_documented_types_and_shapes():
    scene = render(3, (40, 72))
    assert (scene.image.dtype, scene.image.shape) == (np.uint8, (40, 72, 3))
    assert (scene.depth.dtype, scene.depth.shape) == (np.float32, (40, 72))
    assert (scene.semantics.dtype, scene.semantics.shape) == (np.uint8, (40, 72))


@pytest.mark.parametrize(("seed", "size"), [(0, 48), (5, (40, 72)), (10, (72, 40)), (15, 48)])
def test_every_pixel_lies_on_the_nearest_surface_of_its_class(seed, size):
    scene, world = render(seed, size), compose(seed)
    rays, depth = pixel_rays(world, *scene.depth.shape), scene.depth.reshape(-1, 1).astype(np.float64)
    distances = surface_distances(world, world.camera.position + depth * rays)
    classes = scene.semantics.reshape(1, -1).astype(int)
    assert abs(np.take_along_axis(distances, classes, 0)).max() < 1e-3
    for share in np.linspace(0, 0.99, 100):  # nothing stands in front of it
        assert surface_distances(world, world.camera.position + share * depth * rays).min() > -1e-3


@pytest.mark.parametrize("seed", range(6))
def test_light_reaches_exactly_what_no_primitive_hides(seed):
    scene, world = render(seed, 48), compose(seed)
    depth = scene.depth.reshape(-1, 1).astype(np.float64)
    points = world.camera.position + depth * pixel_rays(world, 48, 48)
    look = dress(np.random.default_rng(seed), world)
    for light in look.lights:
        position = light.positions[0]
        reached = scenes._View(world, look, 1.0)._reaches(position, points.T.astype(np.float32))
        hidden = np.zeros(len(points), bool)
        for share in np.linspace(0, 0.99, 200):
            between = position + share * (points - position)
            hidden |= np.min([signed_distance(p, between) for p in world.primitives], 0) < 0
        assert (reached == hidden).mean() < 0.02  # grazing light may fall between the samples
        assert reached.mean() > 0.2


def test_another_size_shows_the_same_scene():
    small, large = render(11, 32), render(11, 96)  # every third pixel center coincides
    np.testing.assert_array_equal(small.semantics, large.semantics[1::3, 1::3])
    np.testing.assert_allclose(small.depth, large.depth[1::3, 1::3], rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40))
def test_any_seed_is_seen_within_range_and_neither_dark_nor_burnt(seed):
    scene = render(seed, 32)
    assert scene.depth.min() > 0.1
    assert scene.depth.max() < 10
    assert 40 < scene.image.mean() < 230
    assert scene.image.std() > 5
    assert set(np.unique(scene.semantics) >= 3) == {True, False}  # room and primitives


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40))
def test_the_label_names_the_majority_and_its_support(seed):
    world = compose(seed)
    kind, support = LABEL_NAMES[world.label].split("-")
    assert world.label == label_of(seed)
    named = [p for p in world.primitives if p.kind == kind]
    assert 3 <= len(world.primitives) <= 8
    assert 2 * len(named) > len(world.primitives)
    tops = [0.0] + [p.center[2] + p.half[2] for p in world.primitives if p.kind in ("box", "cylinder")]
    for primitive in named:
        bottom = primitive.center[2] - primitive.half[2]
        if support == "standing":
            assert min(abs(bottom - top) for top in tops) < 1e-6
        else:
            assert bottom > 0.3


def test_labels_are_balanced_and_every_class_is_seen():
    drawn = [render(seed, 24) for seed in range(40)]
    assert np.bincount([scene.label for scene in drawn]).tolist() == [5] * 8
    shares = np.bincount(np.concatenate([s.semantics.ravel() for s in drawn]), minlength=7) / (40 * 24 * 24)
    assert len(shares) == len(CLASS_NAMES) == 7
    assert shares.min() > 0.01
    assert shares.max() < 0.5


@pytest.fixture(scope="module")
def patches():
    """Patches of 16 x 16 pixels, 64 a scene: colors [P, 256, 3], majority class [P], mean log depth [P]."""
    images, classes, depths = [], [], []
    for seed in range(160):
        scene = render(seed, 128)
        images.append(scene.image.reshape(8, 16, 8, 16, 3).swapaxes(1, 2).reshape(64, 256, 3) / 255)
        semantics = scene.semantics.reshape(8, 16, 8, 16).swapaxes(1, 2).reshape(64, 256)
        classes += [np.bincount(patch).argmax() for patch in semantics]
        depths.append(np.log(scene.depth).reshape(8, 16, 8, 16).mean((1, 3)).ravel())
    return np.concatenate(images), np.array(classes), np.concatenate(depths)


def gain_over_majority(images: np.ndarray, classes: np.ndarray) -> float:
    """Held-out accuracy of a probe of mean colors, minus the share of the commonest class.

    Deviations would tell a little: ceilings are plain.
    """
    colors = images.mean(1)
    half = len(classes) // 2
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    probe.fit(colors[:half], classes[:half])
    return probe.score(colors[half:], classes[half:]) - np.bincount(classes[half:]).max() / half


def test_mean_colors_do_not_give_the_class_away(patches):
    images, classes, _ = patches
    assert gain_over_majority(images, classes) < 0.03
    tinted = images + 0.1 * np.eye(3)[classes % 3][:, None]  # the probe would find a leak of this size
    assert gain_over_majority(tinted, classes) > 0.03


def test_patch_colors_do_not_give_the_depth_away(patches):
    images, _, depths = patches
    colors = np.concatenate([images.mean(1), images.std(1)], 1)
    half = len(depths) // 2
    fitted = LinearRegression().fit(colors[:half], depths[:half])
    assert fitted.score(colors[half:], depths[half:]) < 0.05  # R2


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="-1"):
        render(-1)
    with pytest.raises(ValueError, match="0 x 8"):
        render(0, (0, 8))


# --------------------------------------------------------------------------- the trees


def written(layout: str, root: Path, **options) -> dict[str, bytes]:
    """Writes a tree of 5 + 3 images (web-tars: 5) and reads back every file."""
    arguments = {"train": 5, "val": 0 if layout == "web-tars" else 3, "size": 32, "per_tar": 2} | options
    summary = write_tree(layout, root, **arguments)
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    assert "scenes.json" in files
    assert summary.files == len(files) - 1
    return files


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def matching(files: dict[str, bytes], pattern: str) -> list[str]:
    return [name for name in files if re.fullmatch(pattern, name)]


def members(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def test_imagenet_tars_hold_image_class_and_json_of_each_key(tmp_path):
    files = written("imagenet-tars", tmp_path)
    assert matching(files, r"imagenet1k-train-000[012]\.tar") == matching(files, r".*train.*\.tar")
    assert len(matching(files, r"imagenet1k-train-\d{4}\.tar")) == 3
    assert len(matching(files, r"imagenet1k-validation-\d\d\.tar")) == 2
    contents = members(files["imagenet1k-train-0001.tar"])
    keys = {name.split(".")[0] for name in contents}
    assert set(contents) == {f"{key}.{extension}" for key in keys for extension in ("jpg", "cls", "json")}
    assert sorted(int(contents[f"{key}.cls"]) for key in keys) == [2, 3]  # third and fourth seed
    for key in keys:
        assert pixels(contents[f"{key}.jpg"]).shape == (32, 32, 3)
        assert json.loads(contents[f"{key}.json"])["label"] == int(contents[f"{key}.cls"])


def test_timm_reads_imagenet_tars_by_their_info(tmp_path):
    write_tree("imagenet-tars", tmp_path, 5, 3, 32, per_tar=2)
    for split, count in (("train", 5), ("validation", 3)):
        reader = create_reader("wds/", tmp_path, split=split)
        labels = [label for _, label in reader]
        assert len(reader) == len(labels) == count
        assert sorted(labels) == list(range(count))


def test_info_of_web_tars_names_them_and_counts_their_images(tmp_path):
    files = written("web-tars", tmp_path)
    (split,) = json.loads(files["tars/_info.json"])["splits"].values()
    assert [len(members(files[f"tars/{name}"])) for name in split["filenames"]] == split["shard_lengths"]
    assert split["num_samples"] == sum(split["shard_lengths"]) == 5


@pytest.mark.parametrize(("layout", "expected"), [("web-tars", 0), ("kitti", 100), ("ade20k", 100)])
def test_without_a_number_a_layout_holds_what_it_can(layout, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "_write_groups", lambda *_: [])
    assert write_tree(layout, tmp_path, 1, None, 16).val == expected


def test_web_tars_come_with_statistics_of_every_member(tmp_path):
    files = written("web-tars", tmp_path)
    tars = matching(files, r"tars/\d{4}/\d+\.tar")
    assert len(tars) == 3
    for tar in tars:
        contents, statistics = members(files[tar]), json.loads(files[f"stats/{tar[5:-4]}.json"])
        assert set(contents) == set(statistics)
        for name, row in statistics.items():
            assert name.endswith(".jpeg")
            assert (row["height"], row["width"]) == pixels(contents[name]).shape[:2]
            assert set(row) == {"histogram_score", "mae_loss", "width", "height"}


def test_imagenet_folders_name_the_class(tmp_path):
    files = written("imagenet-folders", tmp_path)
    names = matching(files, r"(train|val)/.+/.+\.JPEG")
    assert {name.split("/")[1] for name in names if name.startswith("train")} == set(LABEL_NAMES[:5])
    assert len([name for name in names if name.startswith("val")]) == 3


def test_nyuv2_depth_is_16_bit_millimeters_beside_480_x_640_images(tmp_path):
    files = written("nyuv2", tmp_path)
    images = matching(files, r"sync/[^/]+/rgb_\d{5}\.jpg")
    assert len(images) == 5
    assert len(matching(files, r"official_splits/test/[^/]+/rgb_\d{5}\.jpg")) == 3
    depth = pixels(files[images[2].replace("rgb", "sync_depth").replace("jpg", "png")])
    assert pixels(files[images[2]]).shape == (480, 640, 3)
    assert (depth.dtype, depth.shape) == (np.uint16, (480, 640))
    expected = render(2, (32, 43)).depth
    assert abs(np.median(depth) / 1000 - np.median(expected)) < 0.05
    assert abs(depth.max() / 1000 - expected.max()) < 0.001


def test_kitti_depth_is_sparse_16_bit_at_frames_of_the_eigen_split(tmp_path):
    files = written("kitti", tmp_path, val=21)
    images = matching(files, r"images/(\d{4}_\d\d_\d\d)/\1_drive_\d{4}_sync/image_02/data/\d{10}\.png")
    assert len(images) == 26
    assert images[0] == "images/2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000005.png"
    assert "images/2011_09_26/2011_09_26_drive_0009_sync/image_02/data/0000000016.png" in images
    _, _, drive, *_, frame = images[0].split("/")
    depth = pixels(files[f"annotations/{drive}/proj_depth/groundtruth/image_02/{frame}"])
    assert pixels(files[images[0]]).shape == (375, 1242, 3)
    assert (depth.dtype, depth.shape) == (np.uint16, (375, 1242))
    assert 0.25 < (depth > 0).mean() < 0.35
    assert not depth[:125].any()
    scene = render(0, (32, 106)).depth * KITTI_DEPTH_SCALE
    assert scene.min() - 0.01 <= depth[depth > 0].min() / 256
    assert depth.max() / 256 <= scene.max() + 0.01


def check_masks(
    files: dict[str, bytes], pairs: list[tuple[str, str]], values: list[int], ignore: int
) -> None:
    """Compares masks with the training scenes: `values` of classes, `ignore` at borders."""
    for seed, (image, mask) in enumerate(pairs):
        semantics, labels = render(seed, 32).semantics, pixels(files[mask])
        assert pixels(files[image]).shape == (32, 32, 3)
        assert (labels.dtype, labels.shape) == (np.uint8, (32, 32))
        unscored = labels == ignore
        assert 0 < unscored.mean() < 0.5
        np.testing.assert_array_equal(labels[~unscored], np.array(values)[semantics[~unscored]])


def test_ade20k_masks_hold_150_classes_and_255(tmp_path):
    files = written("ade20k", tmp_path)
    names = [f"training/ADE_train_{number:08d}" for number in range(1, 6)]
    check_masks(
        files, [(f"images/{n}.jpg", f"annotations/{n}.png") for n in names], [5, 0, 3, 41, 119, 42, 36], 255
    )
    assert len(matching(files, r"annotations/validation/ADE_val_0000000[123]\.png")) == 3


def test_pascal_masks_hold_background_objects_and_255(tmp_path):
    files = written("pascal", tmp_path)
    train = files["ImageSets/Segmentation/train.txt"].decode().split()
    val = files["ImageSets/Segmentation/val.txt"].decode().split()
    assert {f"SegmentationClass/{name}.png" for name in train + val} == set(matching(files, "Segm.*png"))
    assert (len(train), len(val)) == (5, 3)
    pairs = [(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in train]
    check_masks(files, pairs, [0, 0, 0, 20, 4, 5, 16], 255)


def test_loveda_masks_hold_raw_classes_and_0(tmp_path):
    files = written("loveda", tmp_path)
    halves = ["Rural/{}/0", "Urban/{}/1366", "Rural/{}/1", "Urban/{}/1367", "Rural/{}/2"]
    pairs = [
        tuple(f"Train/Train/{h.format(kind)}.png" for kind in ("images_png", "masks_png")) for h in halves
    ]
    check_masks(files, pairs, [1, 2, 3, 4, 5, 6, 7], 0)
    masks = matching(files, r"Val/Val/(Rural|Urban)/masks_png/\d+\.png")
    assert {name.split("/")[-1] for name in masks} == {"2522.png", "3514.png", "2523.png"}


def test_folder_holds_images_depth_in_millimeters_and_all_classes(tmp_path):
    files = written("folder", tmp_path)
    for seed in range(5):
        image, depth, mask = (
            pixels(files[f"train/{kind}/{seed:06d}.png"]) for kind in ("images", "depth", "masks")
        )
        scene = render(seed, 32)
        np.testing.assert_array_equal(image, scene.image)
        np.testing.assert_array_equal(mask, scene.semantics)
        np.testing.assert_allclose(depth / 1000, scene.depth, atol=6e-4)
    assert len(matching(files, r"val/(images|depth|masks)/00000[012]\.png")) == 9


def test_training_and_validation_images_differ(tmp_path):
    files = written("loveda", tmp_path)
    assert len({content for name, content in files.items() if "images_png" in name}) == 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tree_depends_on_its_arguments_only(tmp_path, layout):
    small = {"train": 2, "val": 0}
    assert written(layout, tmp_path / "a", **small) == written(layout, tmp_path / "b", **small)
    assert written(layout, tmp_path / "a", **small) != written(layout, tmp_path / "c", seed=1, **small)


def test_worker_processes_write_the_same_bytes(tmp_path):
    assert written("web-tars", tmp_path / "a") == written("web-tars", tmp_path / "b", workers=2)


def test_a_finished_tree_is_left_alone(tmp_path):
    write_tree("ade20k", tmp_path, 2, 1, 16)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write_tree("ade20k", tmp_path, 2, 1, 16).written == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_root_with_other_contents_is_refused(tmp_path):
    write_tree("ade20k", tmp_path / "tree", 2, 1, 16)
    with pytest.raises(ValueError, match=r'holds another rendered tree: .*"train": 2.*"train": 3'):
        write_tree("ade20k", tmp_path / "tree", 3, 1, 16)
    with pytest.raises(ValueError, match="not empty"):
        write_tree("ade20k", tmp_path, 2, 1, 16)


def test_an_interrupted_tree_is_continued(tmp_path, monkeypatch):
    expected = written("pascal", tmp_path / "whole")
    render_scene, rendered = layouts.render, []

    def stop_at_the_fourth(seed, size):
        rendered.append(seed)
        if len(rendered) == 4:
            raise KeyboardInterrupt
        return render_scene(seed, size)

    monkeypatch.setattr(layouts, "render", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        written("pascal", tmp_path / "broken")
    assert not (tmp_path / "broken" / "scenes.json").exists()
    assert written("pascal", tmp_path / "broken") == expected
    assert len(rendered) == 9  # 5 + 3, and the one that was cut off once more


@pytest.mark.slow
def test_workers_leave_when_the_program_that_renders_is_killed(tmp_path):
    command = [sys.executable, "-m", "pixio", "scenes", "imagenet-folders", tmp_path / "tree"]
    with subprocess.Popen([*command, "--train", "100000", "--val", "0", "--workers", "1"]) as program:
        while not any(tmp_path.rglob("*.JPEG")):
            assert program.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        program.kill()
    stats, deadline = [Path(f"/proc/{child}/stat") for child in children], time.monotonic() + 30
    while any(
        stat.exists() and ") Z " not in stat.read_text() for stat in stats
    ):  # nobody may collect zombies
        assert time.monotonic() < deadline, f"{children} outlive the program"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("imagenet", {}, "imagenet-tars, web-tars"),
        ("web-tars", {"val": 1}, "at most 0 val"),
        ("kitti", {"val": 10_000}, "at most 1.. val"),
        ("ade20k", {"train": -1}, "train must be at least 0, got -1"),
    ],
)
def test_impossible_trees_are_refused_before_anything_is_written(tmp_path, layout, options, message):
    with pytest.raises(ValueError, match=message):
        write_tree(layout, tmp_path / "tree", **({"train": 1, "val": 0, "size": 16} | options))
    assert not (tmp_path / "tree").exists()
