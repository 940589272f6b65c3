"""Images for inference: from a file, a PIL image or an array to the encoder's input, and maps back to its
pixels.

Letters: H x W pixels of the original, h x w of any map over the encoder's input, p patch size, K channels.
Pillow and numpy are imported when the first image is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pixio.images.normalization import normalize, to_tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

ImageSource: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray"
Fit = Literal["square", "resize", "pad"]
FITS = get_args(Fit)
_PADDING = (124, 116, 104)  # ImageNet's mean color: nearly zero once normalized


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the input of the encoder: its upper left part; the rest is padding.

    Attributes:
        original: (H, W) of the image in pixels.
        shown: (height, width) of the part of the input that shows it.
        padded: (height, width) of the whole input.
    """

    original: tuple[int, int]
    shown: tuple[int, int]
    padded: tuple[int, int]

    def to_original(
        self,
        maps: Tensor,
        mode: Literal["bilinear", "bicubic", "nearest"] = "bilinear",
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Sample maps over the input at the pixels of the original image.

        Args:
            maps: [B, K, h, w] over the whole input: features at h = height / p, or masks at any other scale.
            mode: of interpolation; `nearest` for labels.
            size: (height, width) at which the original is wanted; None = its own.

        Returns:
            [B, K, H, W], in the dtype of `maps`; computed in float32.
        """
        steps = [
            (torch.arange(side, device=maps.device) + 0.5) / side * (2 * shown / padded) - 1
            for side, shown, padded in zip(size or self.original, self.shown, self.padded, strict=True)
        ]
        rows, columns = torch.meshgrid(*steps, indexing="ij")
        places = torch.stack([columns, rows], dim=-1).expand(len(maps), -1, -1, -1)  # [B, H, W, 2], x first
        sampled = F.grid_sample(maps.float(), places, mode, padding_mode="border", align_corners=False)
        return sampled.to(maps.dtype)  # [B, K, H, W]

    def patch_at(self, x: float, y: float, patch_size: int = 16) -> tuple[int, int]:
        """Row and column of the patch that shows the original's pixel (x from the left, y from the top).

        Raises:
            ValueError: the point lies outside the image.
        """
        height, width = self.original
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"point {x:g} {y:g} lies outside the image: x is below {width}, y below {height}"
            )
        return (
            int(y / height * self.shown[0]) // patch_size,
            int(x / width * self.shown[1]) // patch_size,
        )


@dataclass(frozen=True)
class Transform:
    """Prepares an image for inference, or each image of a data set: unbatched, as torchvision's transforms.

    Call it, or `placed` to map results back to the image's pixels; the encoder takes one image as it is.

    Files are turned upright as their EXIF says; PIL images and arrays are taken as they are.

    Args:
        size: pixels, see `fit`; None = the image's own.
        fit: `square`: size x size pixels whatever the aspect ratio, as Pixio was evaluated; `resize`: the
            longer side becomes `size`, then each side the nearest multiple of the patch size; `pad`: the
            longer side becomes `size`, then the mean color is added on the right and below up to the next
            multiples.
        patch_size: p.

    Raises:
        ValueError: an unknown fit, or a size that cannot be.
    """

    size: int | None = 256
    fit: Fit = "square"
    patch_size: int = 16

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"unknown fit '{self.fit}': choose one of {', '.join(FITS)}")
        if self.size is None:
            if self.fit == "square":
                raise ValueError("fit 'square' needs a size; 'resize' and 'pad' can keep the image's own")
            return
        if self.size < 1:
            raise ValueError(f"size {self.size} is not a positive number of pixels")
        if self.fit == "square" and self.size % self.patch_size:
            near = max(round(self.size / self.patch_size), 1) * self.patch_size
            raise ValueError(
                f"size {self.size} is not a multiple of the patch size {self.patch_size}: try {near}"
            )

    def __call__(self, image: ImageSource) -> Tensor:
        """Prepare an image.

        Args:
            image: file (JPEG, PNG, WebP) or its bytes, PIL image, or uint8 array [H, W, 3] or [H, W].

        Returns:
            float32 [3, height, width], RGB normalized with the ImageNet statistics.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that cannot be read, or an array of another kind.
            ImportError: Pillow or numpy is missing.
        """
        return self.placed(image)[0]

    def placed(self, image: ImageSource) -> tuple[Tensor, Placement]:
        """As the call itself, and where the image lies in what it returns."""
        pixels, placement = self.pixels(image)
        return normalize(pixels), placement  # [3, height, width]

    def pixels(self, image: ImageSource) -> tuple[Tensor, Placement]:
        """As `placed`, before the normalization: uint8 [3, height, width]."""
        image = read_image(image)
        placement = self.placement(image.height, image.width)
        height, width = placement.shown
        if image.size != (width, height):
            from PIL.Image import Resampling

            image = image.resize((width, height), Resampling.BICUBIC)
        pixels = to_tensor(image)  # [3, height, width]
        if placement.padded == placement.shown:
            return pixels, placement
        padded = torch.tensor(_PADDING, dtype=torch.uint8)[:, None, None].repeat(1, *placement.padded)
        padded[:, :height, :width] = pixels
        return padded, placement

    def placement(self, height: int, width: int) -> Placement:
        """Where an image of height x width pixels lies in the input made from it.

        Raises:
            ValueError: an image without pixels.
        """
        if height < 1 or width < 1:
            raise ValueError(f"an image of {height} x {width} pixels shows nothing: both must be at least 1")
        p = self.patch_size
        if self.fit == "square" and self.size is not None:
            return Placement((height, width), (self.size, self.size), (self.size, self.size))
        scale = self.size / max(height, width) if self.size else 1.0
        high, wide = max(height * scale, 1.0), max(width * scale, 1.0)
        if self.fit == "pad":
            shown = round(high), round(wide)
            return Placement((height, width), shown, (-(-shown[0] // p) * p, -(-shown[1] // p) * p))
        shown = max(round(high / p), 1) * p, max(round(wide / p), 1) * p
        return Placement((height, width), shown, shown)


def transform(size: int | None = 256, fit: Fit = "square", patch_size: int = 16) -> Transform:
    """What prepares an image for inference: `model(pixio.transform(256)("photo.jpg"))`; see `Transform`."""
    return Transform(size, fit, patch_size)


def read_image(image: ImageSource, max_pixels: int | None = None) -> "Image.Image":
    """An image of any `ImageSource` as RGB; see `Transform.__call__`. Files: `max_pixels` as in `decode`."""
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"reading images needs {error.name}: pip install pillow numpy") from None
    from pixio.images.decoding import DamagedDataError, decode, to_rgb

    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ValueError(
                f"array of {image.dtype} {list(image.shape)}: expected uint8 [H, W, 3] or [H, W]"
            )
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, bytes):
        return decode(image, max_pixels=max_pixels)
    try:
        return decode(Path(image).read_bytes(), max_pixels=max_pixels)
    except DamagedDataError as error:
        raise DamagedDataError(f"{image}: {error}") from error
