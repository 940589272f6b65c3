"""Pictures of what a model sees and of how a run went, as files for papers and screens.

Letters: B images, H x W pixels, h x w and N patches, C class tokens, D width. Photographs are RGB uint8.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pixio.features.pca import pca_colors, similarity
from pixio.files import write_atomic
from pixio.images.figures import color_bar, figure
from pixio.images.inference import ImageSource, Placement, Transform, read_image
from pixio.images.normalization import denormalize, normalize, to_tensor
from pixio.models.encoder import PixioViT
from pixio.models.mae import PixioMAE, patch_statistics, patchify, unpatchify
from pixio.models.masking import cell_grid

HIDDEN = 128  # gray of a masked pixel
PANELS = ("original", "masked", "reconstruction", "pasted")
FADED = 0.15  # what is left of the background's contrast, on white
SHOWN = 640  # longer side in pixels at which photographs and maps are drawn
ENLARGED = 2  # times, at most: more pixels would show nothing new
FRAMES = 24  # of a sweep, at most
_PAGE = 7.0  # inches, width of a page of two columns
_PANEL = (0.95, 1.7)  # inches, range of the width of a panel
_BAR = 0.8  # inches beside the panels for a color bar and its labels
_LEAST_DPI = 100  # for legible text
_LETTER = 0.07  # inches, mean width in the names of rows


# ------------------------------------------------------------------------------------------ reconstruction
@torch.inference_mode()
def reconstruct(
    mae: PixioMAE, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
) -> dict[str, Tensor]:
    """Mask images and let the model fill them in.

    A model trained on pixels normalized per patch predicts no mean and no contrast; both are taken from the
    original patch, so judge structure, not brightness.

    Args:
        mae: model in evaluation mode.
        images: uint8 [B, 3, H, W].
        mask_ratio: share of masked cells.
        noise: [B, cells], which cells stay; None draws at random.

    Returns:
        The four `PANELS`, each uint8 [B, 3, H, W]: the image, its visible part, what the model predicts
        everywhere, and the visible part with the prediction pasted into the masked part.
    """
    p = mae.encoder.patch_size
    grid = mae.encoder.grid_of(*images.shape[-2:])
    pixels = normalize(images)
    out = mae(pixels, mask_ratio, noise)
    pred = out.pred.float()
    if mae.norm_pix_loss:
        mean, std = patch_statistics(patchify(pixels, p))
        pred = pred * std + mean
    predicted = denormalize(unpatchify(pred, p, grid))
    hidden = unpatchify(out.mask.unsqueeze(-1).expand(-1, -1, p * p), p, grid) > 0  # [B, 1, H, W]
    return {
        "original": images,
        "masked": torch.where(hidden, torch.full_like(images, HIDDEN), images),
        "reconstruction": predicted,
        "pasted": torch.where(hidden, predicted, images),
    }


def read_pixels(mae: PixioMAE, images: Sequence[str], size: int | None = None) -> Tensor:
    """Image files as squares uint8 [B, 3, S, S], of the size the model was trained at when None."""
    transform = Transform(size or mae.encoder.img_size[0], patch_size=mae.encoder.patch_size)
    return torch.stack([transform.pixels(image)[0] for image in images])


def draw_noise(mae: PixioMAE, images: Tensor, seed: int) -> Tensor:
    """Noise [B, cells] for masks of images [B, 3, H, W], the same for the same seed."""
    rows, columns = cell_grid(mae.encoder.grid_of(*images.shape[-2:]), mae.mask_grid)
    noise = torch.rand(len(images), rows * columns, generator=torch.Generator().manual_seed(seed))
    return noise.to(images.device)


def save_reconstructions(
    mae: PixioMAE,
    images: Tensor,
    path: str | Path | BinaryIO,
    mask_ratio: float = 0.75,
    seed: int = 0,
    draws: int = 1,
    names: Sequence[str] = (),
) -> None:
    """Draw `reconstruct`, a row per image and draw of its mask.

    Args:
        mae, images, mask_ratio: see `reconstruct`.
        path: picture to write.
        seed: of the masks.
        draws: different masks per image.
        names: of the images.
    """
    repeated = images.repeat_interleave(draws, dim=0)  # [B * draws, 3, H, W]
    panels = reconstruct(mae, repeated, mask_ratio, draw_noise(mae, repeated, seed))
    if draws > 1:
        names = [f"{name}, draw {draw}" for name in names for draw in range(1, draws + 1)]
    save_sheet({name: panel.cpu() for name, panel in panels.items()}, path, names)


def save_sweep(
    mae: PixioMAE, images: Tensor, path: str | Path, seed: int = 0, names: Sequence[str] = ()
) -> None:
    """Animate `reconstruct` over the mask ratio: cells disappear one after another, and come back.

    Args:
        mae, images: see `reconstruct`.
        path: ends in .gif, or in .png or .apng for an animated PNG of full color.
        seed: of the order in which cells disappear.
        names: of the images.
    """
    noise = draw_noise(mae, images, seed)
    cells = noise.shape[1]
    steps = torch.linspace(0, cells - 1, min(cells, FRAMES)).round().int().tolist()
    frames = []
    for masked in steps:
        # half a cell less is rounded up to the number wanted; the quotient itself may round beyond it
        panels = reconstruct(mae, images, max(masked - 0.5, 0) / cells, noise)
        drawn = io.BytesIO()
        title = f"{masked} of {cells} cells masked ({100 * masked / cells:.0f} %)"
        save_sheet({name: panel.cpu() for name, panel in panels.items()}, drawn, names, title=title, dpi=100)
        frames.append(Image.open(drawn).convert("RGB"))
    frames += frames[-2:0:-1]
    kind = "GIF" if Path(path).suffix == ".gif" else "PNG"
    # one palette for all frames, else flat colors flicker
    if kind == "GIF":
        palette = frames[len(frames) // 4].quantize(256)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    animation = {"save_all": True, "append_images": frames[1:], "duration": 250, "loop": 0}
    write_atomic(path, lambda file: frames[0].save(file, kind, **animation))


# -------------------------------------------------------------------------------------- features as pictures
class Seen(NamedTuple):
    """A photograph and what an encoder made of it.

    photo: uint8 [3, H, W], as drawn. placement: of the encoder's input. patches: [D, h, w]. cls: [C, D].
    """

    photo: Tensor
    placement: Placement
    patches: Tensor
    cls: Tensor

    def draw(self, maps: Tensor, smooth: bool) -> Tensor:
        """Maps [K, h, w] over the input, at the size of the photograph: [K, H, W]."""
        _, height, width = self.photo.shape
        return self.placement.to_original(maps[None], "bicubic" if smooth else "nearest", (height, width))[0]

    def patches_at(self, points: Sequence[tuple[float, float]]) -> Tensor:
        """Features [points, D] of the patches at (x, y) in pixels of the image.

        Raises:
            ValueError: a point outside the image.
        """
        patch_size = self.placement.padded[0] // self.patches.shape[1]
        places = [self.placement.patch_at(x, y, patch_size) for x, y in points]
        return torch.stack([self.patches[:, row, column] for row, column in places])

    def on_photo(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """The same points in pixels of the photograph as drawn."""
        (height, width), (rows, columns) = self.placement.original, self.photo.shape[1:]
        return [(x * columns / width, y * rows / height) for x, y in points]


@torch.inference_mode()
def look(encoder: PixioViT, image: ImageSource, transform: Transform, block: int = -1) -> Seen:
    """Encode one image; features are taken after a block and the final norm.

    Args:
        encoder: in evaluation mode, on any device.
        image: file, PIL image or array.
        transform: how it becomes the encoder's input.
        block: 0-based, negative ones from the end.
    """
    image = read_image(image)
    inputs, placement = transform.placed(image)
    device = next(encoder.parameters()).device
    features, cls = encoder.get_intermediate_layers(
        inputs.to(device), n=[block], reshape=True, return_class_token=True
    )[0]
    shown = image.copy()
    shown.thumbnail((SHOWN, SHOWN))
    return Seen(to_tensor(shown), placement, features[0].float().cpu(), cls[0].float().cpu())


def pca_panels(
    seen: Sequence[Seen], foreground: bool = False, smooth: bool = False
) -> tuple[dict[str, list[Tensor]], float]:
    """The joint PCA of the patch features of several images, beside them.

    Args:
        seen: images.
        foreground: leave out the background, see `pixio.features.pca.pca_colors`; it is drawn faded.
        smooth: interpolate between patches instead of showing them as squares.

    Returns:
        Panels for `save_sheet`, and the share of the variance that the colors show, 0 to 1.
    """
    colors = pca_colors([one.patches for one in seen], foreground)
    drawn = []
    for one, rgb, inside in zip(seen, colors.maps, colors.foreground, strict=True):
        picture = one.draw(rgb, smooth).clamp(0, 1) * 255
        faded = 255 - FADED * (255 - one.photo.float().mean(0))  # [H, W]
        picture = torch.where(one.draw(inside[None].float(), smooth) > 0.5, picture, faded)  # [3, H, W]
        drawn.append(picture.round().to(torch.uint8))
    title = f"PCA of the patches\n{100 * colors.explained:.0f} % of the variance"
    return {"image": [one.photo for one in seen], title: drawn}, colors.explained


def similarity_panels(
    seen: Sequence[Seen], queries: Sequence[Tensor], title: str, smooth: bool = False
) -> dict[str, list[Tensor]]:
    """How similar features are to the patches of each image, one panel per feature.

    Args:
        seen: images.
        queries: per image, features [Q, D] to compare.
        title: of a panel, before its number.
        smooth: interpolate between patches.

    Returns:
        Panels for `save_sheet`: the images, and Q of maps of cosine similarities.
    """
    maps = [one.draw(similarity(each, one.patches), smooth) for one, each in zip(seen, queries, strict=True)]
    columns = {f"{title} {i + 1}": [one[i] for one in maps] for i in range(len(queries[0]))}
    return {"image": [one.photo for one in seen]} | columns


# -------------------------------------------------------------------------------------------------- sheets
def save_sheet(
    panels: Mapping[str, Sequence[Tensor] | Tensor],
    path: str | Path | BinaryIO,
    names: Sequence[str] = (),
    scale: str = "",
    marks: Sequence[tuple[float, float]] = (),
    title: str = "",
    dpi: int = 200,
) -> None:
    """Draw one row per image and one column per panel; images side by side if that is wider and fits a page.

    Args:
        panels: title -> a tensor per image, the same number for all: photographs uint8 [3, H, W] and maps
            [H, W], which share one scale of colors.
        path: picture to write; a file object receives a PNG.
        names: a label for each image, shortened to its side of the picture.
        scale: what the maps measure, beside their color bar.
        marks: (x, y) of numbered points in the first panel, in its pixels.
        title: of the whole sheet.
        dpi: resolution, less where it would enlarge all images more than `ENLARGED` times.
    """
    shapes = [image.shape[-2:] for image in next(iter(panels.values()))]
    aspects = [width / height for height, width in shapes]
    across = len(panels) < len(aspects) and sum(aspects) * _PANEL[0] <= _PAGE
    maps = [image for images in panels.values() for image in images if image.ndim == 2]
    low, high = (min(m.min().item() for m in maps), max(m.max().item() for m in maps)) if maps else (0, 1)
    panel = min(max(_PAGE / (sum(aspects) if across else len(panels)), _PANEL[0]), _PANEL[1])  # inches
    if across:
        widths, heights = [panel * aspect for aspect in aspects], [panel] * len(panels)
    else:
        widths, heights = [panel] * len(panels), [panel / aspect for aspect in aspects]
    sharp = ENLARGED * max(w for _, w in shapes) / max(widths)
    dpi = int(min(dpi, max(sharp, _LEAST_DPI)))
    sides = widths if across else heights
    shown_names = [_shorten(*each) for each in zip(names, sides, strict=True)] if names else [""] * len(sides)
    headings, labels = (shown_names, list(panels)) if across else (list(panels), shown_names)
    lines = 1 + max(heading.count("\n") for heading in headings)
    width = sum(widths) + 0.2 * (2 if across else bool(names)) + _BAR * bool(maps)
    height = sum(heights) + 0.2 * lines + 0.25 * bool(title)
    with figure(path, width, height, dpi) as sheet:
        sheet.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
        grid = {"squeeze": False, "width_ratios": widths, "height_ratios": heights}
        axes = sheet.subplots(len(heights), len(widths), **grid)
        for images, line in zip(panels.values(), axes if across else axes.T, strict=True):
            for axis, image in zip(line, images, strict=True):
                pixels = image.cpu().numpy()
                pixels = pixels.transpose(1, 2, 0) if image.ndim == 3 else pixels
                shown = axis.imshow(pixels, vmin=low, vmax=high, interpolation="antialiased")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        for axis, heading in zip(axes[0], headings, strict=True):
            axis.set_title(heading, pad=4)
        for axis, label in zip(axes[:, 0], labels, strict=True):
            axis.set_ylabel(label, fontsize=8)
        for number, (x, y) in enumerate(marks, 1):
            axes[0, 0].plot(x, y, "o", markersize=9, mfc="white", mec="black", clip_on=False)
            axes[0, 0].annotate(
                f"{number}", (x, y), ha="center", va="center_baseline", fontsize=6.5, color="black"
            )
        if maps:
            color_bar(shown, list(axes.flat), scale, width, height)
        if title:
            sheet.suptitle(title, fontsize=10)


def _shorten(name: str, inches: float) -> str:
    """What of a name fits, its middle left out: names of files often differ at their ends."""
    room = max(int(inches / _LETTER), 3)
    if len(name) <= room:
        return name
    end = (room - 1) // 2
    return f"{name[: room - 1 - end]}…{name[-end:]}"
