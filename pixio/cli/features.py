"""`pixio features`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pixio.cli.common import FIT, INCOMPLETE, EncoderOptions
from pixio.engine.config import option
from pixio.images.inference import Fit


@dataclass(frozen=True, kw_only=True)
class Features(EncoderOptions):
    """Write the features of images to files.

    Arrays of each image:
      patch_tokens  map [h, w, D], patches row by row
      embedding     mean class token [D], the recommended global embedding
      cls_tokens    all class tokens [C, D]
      mean_patch    mean patch token [D]
    With --blocks, blocks are the first axis. In a folder, unreadable images are skipped and listed in
    index.jsonl, and the exit status is then 3; one file holds all images or is not written.
    `pixio.features.read_features` reads either.
    """

    example = "photos/ --pretrained pixio_vith16.pth --output features --workers 8"
    images: tuple[str, ...] = option(
        help="image files, folders, tars, or quoted patterns with * or **", positional=True
    )
    output: Path = option(
        Path("features.npz"),
        ".npz or .safetensors: one file, held in memory until the end; else a folder, which allows resuming",
    )
    arrays: tuple[str, ...] = option(
        ("patch_tokens", "embedding"),
        "{choices} (see above)",
        metavar="ARRAY",
        choices="pixio.features.extraction:ARRAYS",
    )
    blocks: tuple[int, ...] | None = option(
        None, "block ids, which become the first axis; by default the last block, without that axis"
    )
    before_norm: bool = option(False, "skip the encoder's final norm", negatable=False)
    fit: Fit = option("square", FIT)
    dtype: Literal["bf16", "fp16", "fp32"] = option("fp32", "autocast dtype")
    half: bool = option(False, "store float16 instead of float32", negatable=False)
    format: str = option(
        "safetensors",
        "file format in a folder: {choices}",
        metavar="FORMAT",
        choices="pixio.features.store:FORMATS",
    )
    per_file: int = option(256, "images per file of a folder", ge=1)
    batch_size: int = option(32, "images per batch, all of one size", ge=1)
    workers: int = option(0, "processes that read images", ge=0)

    def __post_init__(self) -> None:
        if self.one_file and not self.output.parent.is_dir():
            raise ValueError(f"--output {self.output}: no folder {self.output.parent.absolute()} to write to")
        if self.output.suffix and not self.one_file:
            raise ValueError(
                f"--output {self.output}: end it in .npz or .safetensors, or name a folder without a dot"
            )

    @property
    def one_file(self) -> bool:
        """Whether all features go into one file, not into the files of a folder."""
        return self.output.suffix in (".npz", ".safetensors")

    def run(self) -> None:
        import time

        from pixio.engine.runtime import place_frozen, start_runtime
        from pixio.features import FeatureExtractor, TokenFeatures, find_images, write_file, write_folder

        shards = find_images(self.images, self.per_file)
        runtime = start_runtime(self.device, self.dtype)
        try:
            if self.one_file and runtime.world_size > 1:
                raise ValueError(f"--output {self.output}: several processes need a folder to write to")
            encoder = place_frozen(self.load_encoder(), runtime.device, runtime.dtype)
            arrays = tuple(dict.fromkeys(self.arrays))
            spec = TokenFeatures(
                self.transform(encoder), arrays, self.blocks or None, not self.before_norm, self.half
            )
            extractor = FeatureExtractor(encoder, spec, runtime, self.batch_size, self.workers)
            began = time.monotonic()
            if self.one_file:
                done = write_file(self.output, extractor, shards)
            else:
                done = write_folder(self.output, extractor, shards, self.format, self.per_file)
            if runtime.is_main:
                speed = done.computed / max(time.monotonic() - began, 1e-9)
                earlier = f", and {done.earlier} from before" if done.earlier else ""
                print(f"{done.computed} images -> {self.output}, {speed:.3g} images/s{earlier}")
                if done.errors:
                    number = f"{len(done.errors)} images or tars"
                    print(f"{number} cannot be read whole, first {done.errors[0]}", file=sys.stderr)
                    raise SystemExit(INCOMPLETE)
        finally:
            runtime.close()
