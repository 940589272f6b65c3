"""`pixio explore`."""

from dataclasses import dataclass
from pathlib import Path

from pixio.cli.common import EncoderOptions, check_new_file
from pixio.engine.config import option


@dataclass(frozen=True, kw_only=True)
class Explore(EncoderOptions):
    """Write a page to explore the features of photographs: one file that needs no server and no network.

    Point at a patch of any photograph to see its cosine similarity to the patches of all of them. Class
    tokens, PCA, blocks and opacity are chosen by mouse, touch or keyboard. Features are reduced to 64
    components of 8 bits: eight photographs of 512 pixels with four blocks take about 4 MB.
    """

    example = "a.jpg b.jpg c.jpg --pretrained pixio_vith16.pth --output explore.html"
    images: tuple[str, ...] = option(help="image files", positional=True)
    output: Path = option(Path("explore.html"), "page to write")
    size: int | None = option(512, "input size of the encoder in pixels, see --fit", ge=1)
    blocks: tuple[int, ...] | None = option(
        None, "block ids (negative: from the end); by default four, evenly spaced"
    )

    def __post_init__(self) -> None:
        check_new_file(self.output, (".html",))

    def run(self) -> None:
        from pixio.cli.explorer_page import view, write_page
        from pixio.engine.runtime import start_runtime

        runtime = start_runtime(self.device, "fp32")
        encoder = self.load_encoder().to(runtime.device)
        depth, transform = len(encoder.blocks), self.transform(encoder)
        spaced = [depth * k // 4 - 1 for k in (1, 2, 3, 4) if depth * k >= 4]
        blocks = encoder.resolve_blocks(self.blocks or sorted(set(spaced)))
        views = [view(encoder, image, transform, blocks) for image in self.images]
        title = Path(self.pretrained).stem if self.pretrained else f"{self.model}, random weights"
        size = write_page(self.output, views, blocks, title, encoder.patch_size)
        print(f"{len(self.images)} images -> {self.output}, {size / 1e6:.1f} MB")
