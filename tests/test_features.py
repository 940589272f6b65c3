"""Features of many images on disk."""

import copy
import errno
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import ALONE
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import pixio
from pixio.engine.runtime import Runtime, place_frozen
from pixio.features import (
    FeatureExtractor,
    FeatureStore,
    TokenFeatures,
    extraction,
    find_images,
    read_features,
    write_file,
    write_folder,
)
from pixio.features.extraction import ARRAYS
from pixio.features.store import FORMATS, StoredArray
from pixio.images.inference import FITS, Transform

SIZES = [(40, 64), (64, 40), (40, 64), (30, 30), (64, 64)]  # height, width
SIDES = st.integers(1, 200)


def photo(height, width, seed=0):
    """Smooth colors, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    (root / "inner").mkdir()
    for i, (height, width) in enumerate(SIZES):
        place = root / "inner" if i == 4 else root
        Image.fromarray(photo(height, width, i)).save(place / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return pixio.PixioViT(img_size=32, embed_dim=16, depth=3, num_heads=2).eval()


def extractor(encoder, runtime=ALONE, batch_size=2, workers=0, size=32, fit="square", **options):
    spec = TokenFeatures(Transform(size, fit), **options)
    return FeatureExtractor(encoder, spec, runtime, batch_size, workers)


def read(folder):
    """All arrays of a folder of safetensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


# ------------------------------------------------------------------------------------------------ sources
def test_folders_patterns_files_and_tars_are_found_once_each(folder, tmp_path):
    tar = tmp_path / "some.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(folder / "0.png", "a.png")
    sources = [folder / "2.png", folder, folder / "**/*.png", tar, tmp_path]
    shards = find_images([str(source) for source in sources])
    files = shards[0].files.split("\0")
    assert [Path(file).name for file in files] == ["2.png", "0.png", "1.png", "3.png", "4.png"]
    assert [shard.name for shard in shards[1:]] == [str(tar)]


def test_folders_that_are_called_as_images_are_no_images(folder, tmp_path):
    (tmp_path / "album.png").mkdir()
    (tmp_path / "album.tar").mkdir()
    (tmp_path / "album.png/a.png").write_bytes((folder / "0.png").read_bytes())
    (shard,) = find_images([str(tmp_path)])
    assert shard.files == str(tmp_path / "album.png/a.png")


@pytest.mark.parametrize("source", ["nothing", "no*.png", "empty"])
def test_sources_without_images_are_named(source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"(no file or folder|no image).*{source.replace('*', '.')}"):
        find_images([str(tmp_path / source)])


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no image .* in .*notes\.txt"):
        find_images([str(tmp_path / "notes.txt")])


# ----------------------------------------------------------------------------------------------- features
@pytest.mark.parametrize("fit", FITS)
def test_stored_features_are_those_of_the_model_image_by_image(fit, folder, encoder, tmp_path):
    every = {"arrays": ARRAYS}
    done = write_folder(tmp_path / "out", extractor(encoder, fit=fit, **every), find_images([str(folder)]))
    assert done == (len(SIZES), 0, [])
    stored = read(tmp_path / "out")
    for path in folder.rglob("*.png"):
        with torch.inference_mode():
            (maps, tokens) = encoder.get_intermediate_layers(
                pixio.transform(32, fit)(path), reshape=True, return_class_token=True
            )[0]
        expected = {
            "patch_tokens": maps[0].permute(1, 2, 0),
            "cls_tokens": tokens[0],
            "embedding": tokens[0].mean(0),
            "mean_patch": maps[0].mean((1, 2)),
        }
        for name, array in expected.items():
            torch.testing.assert_close(stored[f"{path}/{name}"], array)


def test_chosen_blocks_are_the_first_axis_before_the_norm_if_asked(folder, encoder, tmp_path):
    path = str(folder / "0.png")
    chosen = extractor(encoder, block_ids=(0, -1), norm=False, arrays=("cls_tokens",))
    write_file(tmp_path / "f.npz", chosen, find_images([path]))
    with torch.inference_mode():
        outputs = encoder(pixio.transform(32)(path), [0, -1])
    with np.load(tmp_path / "f.npz") as file:
        found = torch.from_numpy(file[f"{path}/cls_tokens"])
    torch.testing.assert_close(found, torch.stack([output["cls_tokens"][0] for output in outputs]))


def test_npy_and_its_index_hold_what_safetensors_hold(folder, encoder, tmp_path):
    shards = find_images([str(folder)])
    for format in FORMATS:
        write_folder(tmp_path / format, extractor(encoder, half=True), shards, format, per_file=2)
    stored = read(tmp_path / "safetensors")
    lines = [json.loads(line) for line in (tmp_path / "npy/index.jsonl").read_text().splitlines()]
    assert len(lines) == len(SIZES)
    for line in lines:
        for name in TokenFeatures.arrays:
            array = np.load(tmp_path / "npy" / f"part_{line['part']:06d}.{name}.npy", mmap_mode="r")
            assert array.dtype == np.float16
            np.testing.assert_array_equal(array[line["row"]], stored[f"{line['image']}/{name}"])
    assert [line["size"] for line in lines if line["image"].endswith("1.png")] == [[64, 40]]


@pytest.mark.parametrize("target", ["f.npz", "f.safetensors", "safetensors", "npy"])
def test_features_are_read_back_by_image(folder, encoder, tmp_path, target):
    shards, run = find_images([str(folder)]), extractor(encoder)
    if "." in target:
        write_file(tmp_path / target, run, shards)
    else:
        write_folder(tmp_path / target, run, shards, target, per_file=2)
    found = read_features(tmp_path / target)
    assert list(found) == [f"{folder}/{i}.png" for i in range(4)] + [f"{folder}/inner/4.png"]
    for path, embedding in found.items():
        with torch.inference_mode():
            tokens = encoder(pixio.transform(32)(path))[-1]["cls_tokens_norm"][0]
        torch.testing.assert_close(embedding, tokens.mean(0))
    with pytest.raises(ValueError, match="holds no cls_tokens"):
        read_features(tmp_path / target, "cls_tokens")


def test_an_array_over_several_files_is_read_like_one_in_memory(tmp_path):
    whole = torch.arange(14.0).reshape(7, 2)
    files = [tmp_path / f"{start}.safetensors" for start in (0, 3, 4)]
    for file, part in zip(files, whole.split([3, 1, 3]), strict=True):
        save_file({"x": part.clone()}, file)
    array = StoredArray(files, "x")
    assert array.shape == (7, 2)
    for start in range(8):
        for stop in range(8):
            assert torch.equal(array[start:stop], whole[start:stop])
    assert torch.equal(array[[6, 0, 3]], whole[[6, 0, 3]])


@pytest.mark.parametrize("name", ["features.npz", "part_000000.embedding.npy"])
def test_an_empty_file_of_features_is_named_as_damaged(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "index.jsonl").write_text('{"image": "a.png", "part": 0, "row": 0}\n')
    path = tmp_path / name if name.endswith(".npz") else tmp_path
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        read_features(path)


def test_images_of_one_name_are_refused_where_one_would_be_lost_in_reading(folder, encoder, tmp_path):
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        for name in ("0.png", "1.png"):
            archive.add(folder / name, "same.png")
    write_folder(tmp_path / "npy", extractor(encoder), find_images([str(tmp_path / "some.tar")]), "npy")
    with pytest.raises(ValueError, match="2 images have 1 names"):
        read_features(tmp_path / "npy")


def test_progress_counts_every_batch(folder, encoder):
    shards, seen = find_images([str(folder)]), []
    parts = extraction.index_shards(shards, 256).parts
    assert len(list(extractor(encoder, batch_size=2).run(shards, parts, seen.append))) == 1
    assert seen == [2, 2, 1]


def test_a_tar_gives_the_features_of_its_files_and_worker_processes_change_nothing(folder, encoder, tmp_path):
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.add(path, path.name)
    tar, mixed = str(tmp_path / "some.tar"), extractor(encoder, fit="resize", size=48, workers=2)
    write_folder(tmp_path / "a", mixed, find_images([tar]), per_file=3)
    write_folder(
        tmp_path / "b", extractor(encoder, fit="resize", size=48), find_images([str(folder)]), per_file=3
    )
    ours = {name.removeprefix(f"{tar}/"): array for name, array in read(tmp_path / "a").items()}
    theirs = {"/".join(name.split("/")[-2:]): array for name, array in read(tmp_path / "b").items()}
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_two_members_of_a_tar_with_one_name_are_refused_where_one_would_be_lost(folder, encoder, tmp_path):
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        for name in ("0.png", "1.png"):
            archive.add(folder / name, "same.png")
    shards, run = find_images([str(tmp_path / "some.tar")]), extractor(encoder)
    with pytest.raises(ValueError, match=r"two images are called .*some\.tar/same\.png"):
        write_file(tmp_path / "f.npz", run, shards)
    with pytest.raises(ValueError, match=r"two images are called .*some\.tar/same\.png"):
        write_folder(tmp_path / "safetensors", run, shards)
    write_folder(tmp_path / "npy", run, shards, "npy")
    assert len(np.load(tmp_path / "npy/part_000000.embedding.npy")) == 2


def test_a_stopped_run_goes_on_with_the_parts_it_lacks(folder, encoder, tmp_path, monkeypatch):
    shards, run = find_images([str(folder)]), extractor(encoder)
    write_folder(tmp_path / "whole", run, shards, per_file=2)
    write_part, asked = FeatureStore._write, []

    def stop_at_second(self, number, images, arrays):
        if number == 1:
            (self.folder / ".part_000001.safetensors.99.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        write_part(self, number, images, arrays)

    monkeypatch.setattr(FeatureStore, "_write", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "stopped", run, shards, per_file=2)
    assert not (tmp_path / "stopped/index.jsonl").exists()
    monkeypatch.setattr(
        FeatureStore, "_write", lambda *arguments: (asked.append(arguments[1]), write_part(*arguments))
    )
    assert write_folder(tmp_path / "stopped", run, shards, per_file=2) == (3, 2, [])
    assert asked == [1, 2]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == names
    for name in names:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_ranks_share_the_parts_and_write_what_one_does(folder, encoder, tmp_path, monkeypatch):
    shards = find_images([str(folder)])
    write_folder(tmp_path / "one", extractor(encoder), shards, per_file=2)
    rendezvous, values, written = threading.Barrier(2, timeout=60), [None, None], []

    def gather(self, value):
        values[self.rank] = value
        rendezvous.wait()
        found = list(values)
        rendezvous.wait()
        return found

    write_part = FeatureStore._write

    def note(self, number, *rest):
        written.append((threading.current_thread().name, number))
        write_part(self, number, *rest)

    monkeypatch.setattr(FeatureStore, "_write", note)
    monkeypatch.setattr(Runtime, "gather", gather)
    ranks = [
        threading.Thread(
            target=write_folder,
            name=str(rank),
            args=(tmp_path / "two", extractor(encoder, replace(ALONE, rank=rank, world_size=2)), shards),
            kwargs={"per_file": 2},
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(written) == [("0", 0), ("0", 2), ("1", 1)]
    assert (tmp_path / "two/index.jsonl").read_text() == (tmp_path / "one/index.jsonl").read_text()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"size": 48}, "size"), ({"half": True}, "half"), ({"arrays": ("embedding",)}, "arrays")],
)
def test_other_settings_do_not_mix_with_what_is_there(change, named, folder, encoder, tmp_path):
    shards = find_images([str(folder / "0.png")])
    write_folder(tmp_path, extractor(encoder), shards)
    with pytest.raises(ValueError, match=f"other {named}:"):
        write_folder(tmp_path, extractor(encoder, **change), shards)


def test_other_weights_and_images_do_not_mix_with_what_is_there(folder, encoder, tmp_path):
    write_folder(tmp_path, extractor(encoder), find_images([str(folder / "0.png")]))
    other = pixio.PixioViT(img_size=32, embed_dim=16, depth=3, num_heads=2).eval()
    with pytest.raises(ValueError, match="other weights, images:"):
        write_folder(tmp_path, extractor(other), find_images([str(folder / "1.png")]))


def test_an_encoder_held_in_bf16_fills_a_folder(folder, encoder, tmp_path):
    runtime = Runtime(torch.device("cpu"), torch.bfloat16)
    frozen = place_frozen(copy.deepcopy(encoder), runtime.device, runtime.dtype)
    done = write_folder(tmp_path, extractor(frozen, runtime), find_images([str(folder / "0.png")]))
    assert (done.computed, done.errors) == (1, [])


def test_unreadable_images_are_reported_and_the_others_stored(folder, encoder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    shards = find_images([str(tmp_path / "bad.png"), str(folder)])
    done = write_folder(tmp_path / "out", extractor(encoder), shards, "npy")
    assert done.computed == len(SIZES) + 1
    assert len(done.errors) == 1
    assert "bad.png" in done.errors[0]
    assert len(np.load(tmp_path / "out/part_000000.embedding.npy")) == len(SIZES)
    lines = [json.loads(line) for line in (tmp_path / "out/index.jsonl").read_text().splitlines()]
    assert [line.get("row") for line in lines] == [None, 0, 1, 2, 3, 4]


def test_a_folder_of_images_that_cannot_be_read_is_an_error_that_names_one(encoder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"none of 1 images can be read, the first is .*bad\.png"):
        write_folder(tmp_path / "out", extractor(encoder), find_images([str(tmp_path / "bad.png")]))


@pytest.mark.parametrize("format", FORMATS)
def test_names_that_are_not_utf8_are_escaped_alike_in_index_and_arrays(format, folder, encoder, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(name, "wb") as file:
        file.write((folder / "0.png").read_bytes())
    write_folder(tmp_path / "out", extractor(encoder), find_images([os.fsdecode(name)]), format)
    (line,) = (tmp_path / "out/index.jsonl").read_text("ascii").splitlines()
    assert json.loads(line)["image"] == f"{tmp_path}/caf\\xe9.png"
    if format == "safetensors":
        assert f"{tmp_path}/caf\\xe9.png/embedding" in read(tmp_path / "out")


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    format, folder, encoder, tmp_path, monkeypatch
):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run, shards, fsync = extractor(encoder), find_images([str(folder)]), os.fsync
    write_part = FeatureStore._write
    monkeypatch.setattr(
        FeatureStore, "_write", lambda *part: (monkeypatch.setattr(os, "fsync", refuse), write_part(*part))
    )
    with pytest.raises(ValueError, match=r"cannot write .*part_000000.*No space left on device .* free"):
        write_folder(tmp_path, run, shards, format, per_file=2)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    monkeypatch.setattr(FeatureStore, "_write", write_part)
    monkeypatch.setattr(os, "fsync", fsync)
    assert write_folder(tmp_path, run, shards, format, per_file=2) == (len(SIZES), 0, [])


def test_a_disk_without_room_for_all_arrays_is_refused_before_the_first_part(
    folder, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1500))
    with pytest.raises(ValueError, match=r"cannot write .* \(1,600 bytes needed, 1,500 bytes free\)"):
        write_folder(tmp_path, extractor(encoder), find_images([str(folder)]), "npy", per_file=2)


def test_workers_with_little_shared_memory_send_images_through_pipes(folder, encoder, tmp_path, monkeypatch):
    shards = find_images([str(folder)])
    write_folder(tmp_path / "one", extractor(encoder, workers=1), shards)
    monkeypatch.setattr(extraction, "_SHARED_BYTES", 2**60)
    write_folder(tmp_path / "two", extractor(encoder, workers=1), shards)
    for name, array in read(tmp_path / "one").items():
        assert torch.equal(read(tmp_path / "two")[name], array)


def test_folders_written_by_the_first_version_are_completed(folder, encoder, tmp_path, monkeypatch):
    class Part(NamedTuple):  # as it was called, and hashed by its repr
        shard: int
        start: int
        stop: int

    shards = find_images([str(folder)])
    write_folder(tmp_path, extractor(encoder), shards, per_file=2)
    images = repr(([shards[0].files], [Part(0, 0, 2), Part(0, 2, 4), Part(0, 4, 5)]))
    weights = hashlib.sha256(b"".join(value.numpy().tobytes() for value in encoder.state_dict().values()))
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["images"] == hashlib.sha256(images.encode()).hexdigest()
    assert settings["weights"] == weights.hexdigest()
    for name in ("part_000001.safetensors", "part_000001.jsonl", "index.jsonl"):
        (tmp_path / name).unlink()
    assert write_folder(tmp_path, extractor(encoder), shards, per_file=2) == (2, 3, [])


def test_one_file_of_a_few_images_holds_all_of_them_or_is_not_written(folder, encoder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"bad\.png"):
        write_file(
            tmp_path / "f.npz", extractor(encoder), find_images([str(folder), str(tmp_path / "bad.png")])
        )
    assert not (tmp_path / "f.npz").exists()


def test_features_that_are_not_finite_are_refused(folder, tmp_path):
    broken = pixio.PixioViT(img_size=32, embed_dim=16, depth=1, num_heads=2).eval()
    torch.nn.init.constant_(broken.norm.bias, 1e6)
    with pytest.raises(ValueError, match=r"0\.png are not finite: store float32"):
        write_file(tmp_path / "f.npz", extractor(broken, half=True), find_images([str(folder)]))


def test_maps_of_different_sizes_are_refused_as_npy(folder, encoder, tmp_path):
    with pytest.raises(ValueError, match="npy holds maps of one size"):
        write_folder(tmp_path, extractor(encoder, fit="pad"), find_images([str(folder)]), "npy")


def test_a_damaged_tar_is_named(encoder, tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("notes.txt"))
    (tmp_path / "bad.tar").write_bytes(data.getvalue())
    with pytest.raises(ValueError, match=r"bad\.tar: no image"):
        write_folder(tmp_path / "out", extractor(encoder), find_images([str(tmp_path / "bad.tar")]))
