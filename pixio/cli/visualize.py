"""The commands of `pixio` that draw; the drawing itself is in `pixio.cli.drawing`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixio.cli.common import EncoderOptions, check_new_file
from pixio.engine.config import option

if TYPE_CHECKING:
    from pixio.cli.drawing import Seen

PICTURES = (".png", ".pdf", ".svg")
ANIMATIONS = (".gif", ".png", ".apng")


def _stems(images: Sequence[str]) -> list[str]:
    """What images are called in pictures."""
    return [Path(image).stem for image in images]


@dataclass(frozen=True, kw_only=True)
class _FeaturePicture(EncoderOptions):
    """Options of the pictures of features."""

    images: tuple[str, ...] = option(help="image files", positional=True)
    block: int = option(-1, "block to take features from; negative values count from the end")
    smooth: bool = option(False, "interpolate between patches", negatable=False)
    output: Path

    def __post_init__(self) -> None:
        check_new_file(self.output, PICTURES)

    def run(self) -> None:
        from pixio.cli import drawing
        from pixio.engine.runtime import start_runtime

        runtime = start_runtime(self.device, "fp32")
        encoder = self.load_encoder().to(runtime.device)
        transform = self.transform(encoder)
        seen = [drawing.look(encoder, image, transform, self.block) for image in self.images]
        panels, settings, remark = self.panels(seen)
        drawing.save_sheet(panels, self.output, _stems(self.images), **settings)
        print(f"{len(self.images)} images -> {self.output}{remark}")

    def panels(self, seen: "list[Seen]") -> tuple[dict[str, list], dict[str, Any], str]:
        """What to draw of images, settings of `drawing.save_sheet`, and what to print of it."""
        raise NotImplementedError(f"{type(self).__name__} draws nothing")


@dataclass(frozen=True, kw_only=True)
class Pca(_FeaturePicture):
    """Draw the joint PCA of the patch features of one or several images.

    Red, green and blue are the first three components over the patches of all images together: what looks
    alike in the picture looks alike to the encoder.
    """

    example = "cat.jpg dog.jpg --pretrained pixio_vith16.pth --size 512 --foreground"
    output: Path = option(Path("pca.png"), "picture to write")
    foreground: bool = option(False, "exclude the background from the PCA", negatable=False)

    def panels(self, seen: "list[Seen]") -> tuple[dict[str, list], dict[str, Any], str]:
        from pixio.cli.drawing import pca_panels

        panels, explained = pca_panels(seen, self.foreground, self.smooth)
        return panels, {}, f": {explained:.1%} of the variance"


@dataclass(frozen=True, kw_only=True)
class Tokens(_FeaturePicture):
    """Draw how similar each class token is to the patches."""

    example = "photo.jpg --pretrained pixio_vith16.pth --size 512"
    output: Path = option(Path("tokens.png"), "picture to write")

    def panels(self, seen: "list[Seen]") -> tuple[dict[str, list], dict[str, Any], str]:
        from pixio.cli.drawing import similarity_panels

        panels = similarity_panels(seen, [one.cls for one in seen], "token", self.smooth)
        return panels, {"scale": "cosine similarity"}, ""


@dataclass(frozen=True, kw_only=True)
class Similarity(_FeaturePicture):
    """Draw how similar the patch at a point is to all patches of all images."""

    example = "a.jpg b.jpg --point 120 80 --pretrained pixio_vith16.pth --size 512"
    output: Path = option(Path("similarity.png"), "picture to write")
    point: tuple[tuple[float, float], ...] = option(
        help="pixel of the first image whose patch is compared; can be repeated",
        metavar=("X", "Y"),
        ge=0,
    )

    def panels(self, seen: "list[Seen]") -> tuple[dict[str, list], dict[str, Any], str]:
        from pixio.cli.drawing import similarity_panels

        queries = [seen[0].patches_at(self.point)] * len(seen)
        panels = similarity_panels(seen, queries, "point", self.smooth)
        return panels, {"scale": "cosine similarity", "marks": seen[0].on_photo(self.point)}, ""


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Draw each image, its masked version, the reconstruction, and the reconstruction in the masked part."""

    example = "a.jpg b.jpg --checkpoint runs/x/checkpoints/step_00001000"
    images: tuple[str, ...] = option(help="image files", positional=True)
    checkpoint: str = option(help="training checkpoint (encoder and decoder)")
    output: Path = option(
        Path("reconstruction.png"), "picture to write; with --sweep a .gif, or an animated .png"
    )
    mask_ratio: float = option(0.75, "share of masked cells", ge=0, lt=1)
    mask_grid: int | None = option(None, "side of a masked cell in patches; as in training if omitted", ge=1)
    seed: int = option(0, "random seed of the masks", ge=0)
    draws: int = option(1, "number of different masks per image", ge=1)
    sweep: bool = option(False, "animate from nothing masked to almost everything masked", negatable=False)
    size: int | None = option(None, "side of the images in pixels; as in training if omitted", ge=1)

    def __post_init__(self) -> None:
        check_new_file(
            self.output, ANIMATIONS if self.sweep else PICTURES, f"with{'' if self.sweep else 'out'} --sweep"
        )
        if self.sweep and self.draws > 1:
            raise ValueError(f"--draws {self.draws}: a --sweep shows one mask")

    def run(self) -> None:
        import pixio
        from pixio.cli import drawing

        grid = {"mask_grid": self.mask_grid} if self.mask_grid else {}
        mae = pixio.load_mae(self.checkpoint, **grid).eval()
        pixels, names = drawing.read_pixels(mae, self.images, self.size), _stems(self.images)
        if self.sweep:
            drawing.save_sweep(mae, pixels, self.output, self.seed, names)
        else:
            drawing.save_reconstructions(
                mae, pixels, self.output, self.mask_ratio, self.seed, self.draws, names
            )
        print(f"{len(self.images)} images -> {self.output}")


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Draw loss, learning rate and health of one or several runs."""

    example = "runs/first runs/second"
    logs: tuple[str, ...] = option(help="log.jsonl files, or the folders that contain them", positional=True)
    output: Path = option(Path("curves.png"), "picture to write")
    expect: Path | None = option(None, "JSON file with points of an expected run to draw on top")
    save_expected: Path | None = option(
        None, "JSON file to write, with points of the one run given, for --expect"
    )

    def __post_init__(self) -> None:
        check_new_file(self.output, PICTURES)
        if self.save_expected and len(self.logs) > 1:
            raise ValueError(f"--save_expected takes one run, found {len(self.logs)}")

    def run(self) -> None:
        from pixio.cli import curves

        curves.save_curves(self.logs, self.output, self.expect)
        print(f"{len(self.logs)} run{'s' * (len(self.logs) > 1)} -> {self.output}")
        if self.save_expected:
            curves.save_expected(self.logs[0], self.save_expected)
            print(f"{self.logs[0]} -> {self.save_expected}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Summarize a run in one self-contained HTML page.

    It holds curves, reconstructions, evaluations (results.json in the run, and in folders beside it if they
    evaluated its encoder) and the configuration.
    """

    example = "runs/first --images a.jpg b.jpg"
    folder: Path = option(help="output folder of a run, with log.jsonl", positional=True, metavar="RUN")
    output: Path | None = option(None, "page to write; RUN/report.html if omitted")
    images: tuple[str, ...] = option((), "images to reconstruct; rendered scenes if omitted")
    results: tuple[str, ...] = option((), "folders with further evaluations (results.json)", metavar="FOLDER")

    def __post_init__(self) -> None:
        if self.output:
            check_new_file(self.output, (".html",))

    def run(self) -> None:
        from pixio.cli.report import write_report

        output = self.output or self.folder / "report.html"
        write_report(self.folder, output, self.images, self.results)
        print(f"{self.folder} -> {output}")


COMMANDS = {
    "pca": Pca,
    "tokens": Tokens,
    "similarity": Similarity,
    "reconstruct": Reconstruct,
    "curves": Curves,
    "report": Report,
}
