"""`pixio predict`: depth maps and masks of photographs as files."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pixio.cli.common import INCOMPLETE
from pixio.engine.config import option

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from pixio.data.shards import Shard
    from pixio.data.tar_index import Entry
    from pixio.dense import Predictor

SETTINGS = "predictions.json"
_UNITS = (1000.0, 256.0, 100.0)  # PNG values per meter: NYUv2's, KITTI's, centimeters
_LARGEST = 2**16 - 1
_SIDE = 5.0  # inches, width of a panel of a picture


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Write depth maps or masks of photographs, with a head trained by the evaluation.

    Files in --output, named after the photographs:
      depth/     16-bit PNG in fractions of a meter, or .npy in meters
      masks/     palette PNG with the class index of each pixel, or .npy
      pictures/  photograph and prediction, with a color bar in meters or a legend
    predictions.json lists units, classes and colors. A stopped run resumes. Unreadable photographs are
    reported and skipped, and the exit status is then 3.
    """

    example = "photos/ --head runs/nyuv2/head.pth --pretrained pixio_vith16.pth --output depth"
    images: tuple[str, ...] = option(
        help="image files, folders, tars, or quoted patterns with * or **", positional=True
    )
    head: str = option(help="head.pth of eval_monodepth.py or eval_semseg.py")
    pretrained: str | None = option(
        None, "weights of the head's encoder; by default the path stored in the head"
    )
    output: Path = option(Path("predictions"), "folder to write to")
    mode: Literal["slide", "whole"] = option(
        "slide", "slide: overlapping windows, as in the evaluation; whole: each photograph in one piece"
    )
    format: Literal["png", "npy", "both"] = option("png", "file format of depth maps and masks")
    depth_scale: float | None = option(
        None, "PNG values per meter; by default 1000, or 256 or 100 for long ranges", gt=0
    )
    pictures: bool = option(True, "draw a picture of each prediction")
    window: int | None = option(None, "side of the windows in pixels; as in training if omitted", ge=1)
    window_batch: int = option(16, "windows per forward pass; limits the memory", ge=1)
    device: str = option("auto", "auto (a GPU if any), cpu, or a torch device")
    dtype: Literal["bf16", "fp16", "fp32"] = option("fp32", "autocast dtype")

    def run(self) -> None:
        from tqdm import tqdm

        from pixio.dense import Predictor
        from pixio.features import find_images

        shards = find_images(self.images)
        predictor = Predictor.from_pretrained(
            self.head,
            self.pretrained,
            mode=self.mode,
            device=self.device,
            dtype=self.dtype,
            window_batch=self.window_batch,
            window=self.window,
        )
        runtime = predictor.runtime
        try:
            writer = _Writer(self.output, predictor, self.format, self.depth_scale, self.pictures)
            runtime.agree(writer.begin)
            photos, damaged = list_photos(shards, self.output)
            errors = damaged if runtime.is_main else []
            share = photos[runtime.rank :: runtime.world_size]
            waiting = [photo for photo in share if not writer.has(photo.name)]
            hidden = None if runtime.is_main else True  # None: where nobody watches
            made = 0
            for photo in tqdm(waiting, "predict", disable=hidden):
                if error := writer.predict(photo):
                    errors.append(error)
                    tqdm.write(f"skipped {error}", file=sys.stderr)
                else:
                    made += 1
            done = runtime.gather((made, len(share) - len(waiting), errors))
            made, before = (sum(each[i] for each in done) for i in (0, 1))
            errors = [error for each in done for error in each[2]]
            if runtime.is_main:
                earlier = f", and {before} from before" if before else ""
                print(f"{made} photograph{'s' * (made != 1)} -> {self.output}{earlier}")
                if errors:
                    print(f"{len(errors)} left out, first {errors[0]}", file=sys.stderr)
            if errors:
                raise SystemExit(INCOMPLETE)
        finally:
            runtime.close()


class Photo(NamedTuple):
    """A photograph in a folder or tar; `name` is its path without suffix below the folders of the output."""

    shard: "Shard"
    entry: "Entry"
    label: str
    name: str

    def read(self) -> bytes:
        with self.shard.open(0) as source:
            return source.read(self.entry)


def list_photos(shards: "Sequence[Shard]", output: Path) -> tuple[list[Photo], list[str]]:
    """All photographs outside of the output folder, and a line on each tar or photograph that is left out.

    Names are relative to the deepest folder that holds all files; a tar's begin with the tar's own. Where two
    photographs differ in their suffix alone, both keep it. Left out are tars that cannot be read, and
    photographs whose name another has (in a tar, or in two tars of one name): one would overwrite the other.
    """
    from pixio.images.decoding import DamagedDataError

    found, errors = [], []
    for shard in shards:
        try:
            with shard.open(0) as source:
                found += [(shard, entry) for entry in source.entries]
                errors += [f"{shard.name}: {source.damage}"] if source.damage else []
        except (DamagedDataError, OSError) as error:
            errors.append(f"{shard.name}: {error}")
    ours = os.path.join(os.path.abspath(output), "")
    found = [pair for pair in found if pair[0].name or not os.path.abspath(pair[1].key).startswith(ours)]
    files = [os.path.abspath(entry.key) for shard, entry in found if not shard.name]
    common = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""

    def path_of(shard: "Shard", entry: "Entry") -> PurePosixPath:
        if not shard.name:
            return PurePosixPath(Path(os.path.relpath(entry.key, common)).as_posix())
        parts = [part for part in PurePosixPath(entry.key).parts if part not in ("/", "..")]
        return PurePosixPath(Path(shard.name).stem, *parts)  # a tar may be anybody's

    paths = [path_of(shard, entry) for shard, entry in found]
    count = Counter(str(path.with_suffix("")) for path in dict.fromkeys(paths))
    photos: dict[str, Photo] = {}  # by name
    for (shard, entry), path in zip(found, paths, strict=True):
        plain = str(path.with_suffix(""))
        label = f"{shard.name}/{entry.key}" if shard.name else entry.key
        name = plain if count[plain] == 1 else str(path)
        if name in photos:
            errors.append(f"{label}: {photos[name].label} is written as {name} already; rename one of them")
        else:
            photos[name] = Photo(shard, entry, label, name)
    return list(photos.values()), errors


class _Writer:
    """Predictions of one predictor as the files of a folder; arguments as of `Predict`."""

    def __init__(
        self, folder: Path, predictor: "Predictor", format: str, depth_scale: float | None, pictures: bool
    ):
        from pixio.dense import Depth

        self.folder, self.predictor, self.pictures = folder, predictor, pictures
        self.suffixes = (".png", ".npy") if format == "both" else (f".{format}",)
        self.kind = "depth" if isinstance(predictor.output, Depth) else "masks"
        if isinstance(predictor.output, Depth):
            far = predictor.output.max_depth
            fitting = [units for units in _UNITS if far * units <= _LARGEST]
            self.units = depth_scale or (fitting or [_LARGEST / far])[0]
            if far * self.units > _LARGEST and ".png" in self.suffixes:
                raise ValueError(
                    f"--depth_scale {self.units:g}: {far:g} m would be {far * self.units:g}, a 16-bit PNG "
                    f"ends at {_LARGEST}: choose at most {_LARGEST / far:g}, or --format npy"
                )

    def begin(self) -> None:
        """Make the folder, or check that it holds predictions by the same head in the same way.

        Raises:
            ValueError: it does not.
        """
        from pixio.dense import Depth
        from pixio.files import read_json, write_json
        from pixio.models.external import fingerprint

        predictor = self.predictor
        settings: dict[str, Any] = {
            "head_sha256": fingerprint(predictor.head),
            "encoder_sha256": fingerprint(predictor.frozen.encoder),
            "mode": predictor.mode,
            "window": list(predictor.window),
        }
        if isinstance(predictor.output, Depth):
            settings |= {"png_values_per_meter": self.units, "max_depth": predictor.output.max_depth}
        else:
            settings["class_names"] = list(predictor.class_names)
            settings["class_colors"] = [list(color) for color in predictor.class_colors]
        path = self.folder / SETTINGS
        if path.exists():
            found = read_json(path)
            for key, value in settings.items():
                if found.get(key) != value:
                    raise ValueError(
                        f"{self.folder} holds predictions with {key} {found.get(key)}, not {value}: choose "
                        "another --output"
                    )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)

    def files(self, name: str) -> Iterator[Path]:
        """All files of a photograph."""
        for suffix in self.suffixes:
            yield self.folder / self.kind / f"{name}{suffix}"
        if self.pictures:
            yield self.folder / "pictures" / f"{name}.png"

    def has(self, name: str) -> bool:
        return all(file.is_file() for file in self.files(name))

    def predict(self, photo: Photo) -> str:
        """Predict for a photograph and write its files; returns why it cannot be read, or nothing.

        Raises:
            OSError: the disk refused.
            ValueError: the prediction is not finite.
        """
        from pixio.dense.predictor import MAX_PIXELS
        from pixio.images.decoding import DamagedDataError, decode
        from pixio.images.normalization import to_tensor

        try:
            pixels = to_tensor(decode(photo.read(), max_pixels=MAX_PIXELS))  # [3, H, W]
            prediction = self.predictor.predict(pixels, photo.label).cpu()
        except (DamagedDataError, OSError) as error:
            return f"{photo.label}: {error}"
        self._write(photo.name, pixels, prediction)
        return ""

    def _write(self, name: str, pixels: "Tensor", prediction: "Tensor") -> None:
        import numpy as np

        from pixio.dense import Depth
        from pixio.files import write_atomic
        from pixio.images.panels import draw_classes, draw_depth

        values, output = prediction.numpy(), self.predictor.output
        for file in self.files(name):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_relative_to(self.folder / "pictures"):
                shown, maps = [pixels.permute(1, 2, 0).numpy()], {self.kind: [values]}
                if isinstance(output, Depth):
                    draw_depth(file, shown, maps, output.min_depth, output.max_depth, side=_SIDE)
                else:
                    draw_classes(file, shown, maps, output.names, output.colors, side=_SIDE)
            elif file.suffix == ".npy":
                write_atomic(file, partial(np.save, arr=values))
            else:
                write_atomic(file, partial(self._image(values).save, format="png"))

    def _image(self, values: "np.ndarray") -> "Image.Image":
        """A prediction [H, W] as the image that a PNG holds."""
        import numpy as np
        from PIL import Image

        if self.kind == "depth":  # 0 would stand for what is not known
            return Image.fromarray((values * self.units).round().clip(1, _LARGEST).astype(np.uint16))
        image = Image.fromarray(values).convert("L")
        image.putpalette([part for color in self.predictor.class_colors for part in color])
        return image
