"""Depth maps and masks of photographs.

    predictor = Predictor.from_pretrained("head.pth", encoder="pixio_vith16.pth")
    depth = predictor("photo.jpg")  # meters, float32 [H, W], at the photograph's own size

Letters: n windows, O outputs of the head, H x W pixels of a photograph, S side of a window.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixio.dense.frozen import FrozenEncoder
from pixio.dense.head_file import WINDOW, read_head, window_of
from pixio.dense.outputs import Classes, Color, Output
from pixio.dense.sliding import slide
from pixio.images.inference import ImageSource, read_image
from pixio.images.normalization import normalize, to_tensor

if TYPE_CHECKING:
    from pixio.engine.runtime import Runtime

Mode = Literal["slide", "whole"]
MAX_PIXELS = 2 * 89_478_485  # of a file, 16,384 x 8,192 among them: where Pillow suspects an attack
WHOLE_PIXELS = 2**24  # of a photograph that goes through the encoder in one piece: 65,536 patches of 16


class Predictor:
    """Predicts as the evaluation programs do: they, too, predict by this class.

    Mode `slide` averages overlapping square windows (see `slide`). Beside a few copies of the photograph
    (3 H W bytes) and of the result it holds 4 O S (W + S) bytes and what the network takes for `window_batch`
    windows, whatever the height. Mode `whole` passes the photograph through the network in one piece,
    zero-padded on the right and below to whole patches: 4 O H W bytes and more, for up to `WHOLE_PIXELS`.

    Args:
        frozen: the encoder.
        head: on its maps, in evaluation mode.
        output: what the outputs of the head stand for.
        window: side S and stride of the windows, in pixels.
        runtime: device and precision; encoder and head are on its device.
        window_batch: windows that go through the network together; changes memory and speed alone.
        mode: see above.

    Attributes:
        class_names, class_colors: of the classes, by number; empty for depth.
    """

    def __init__(
        self,
        frozen: FrozenEncoder,
        head: nn.Module,
        output: Output,
        window: tuple[int, int],
        runtime: "Runtime",
        window_batch: int = 16,
        mode: Mode = "slide",
    ):
        if mode not in ("slide", "whole"):
            raise ValueError(f"unknown mode '{mode}': choose slide or whole")
        self.frozen, self.head, self.output, self.runtime = frozen, head, output, runtime
        self.window, self.window_batch, self.mode = window, window_batch, mode

    @classmethod
    def from_pretrained(
        cls,
        head: str | Path,
        encoder: nn.Module | str | Path | None = None,
        *,
        mode: Mode = "slide",
        device: str = "auto",
        dtype: str = "fp32",
        window_batch: int = 16,
        window: int | None = None,
    ) -> "Predictor":
        """Build it from the file of a trained head.

        Args:
            head: `head.pth` of a run of eval_monodepth.py or eval_semseg.py.
            encoder: weights of the encoder it was trained on (for one of transformers its folder), or the
                encoder itself; None = where they were, or beside the head. Its fingerprint is compared.
            mode: `slide` as the evaluation does, or `whole`.
            device, dtype: as of `pixio.engine.runtime.start_runtime`; evaluation computes in bf16 by default.
            window_batch: see the class.
            window: side of the windows in pixels; None = as in training (of older files, which do not say it,
                the published 256).

        Raises:
            ValueError: not a head, another encoder than the head's, or an impossible setting.
            FileNotFoundError: the weights are not there.
        """
        file = read_head(head)
        module = file.load_encoder(encoder, head)
        frozen = FrozenEncoder(module, file.blocks(module), file.identity["cls_concat"])
        if window is not None or file.window is None:
            sides = window_of(WINDOW if window is None else window, module.patch_size)
        else:
            sides = file.window
        from pixio.engine.runtime import start_runtime  # here, so that heads alone need torch alone

        runtime = start_runtime(device, dtype)
        parts = frozen.to(runtime.device), file.make_head().to(runtime.device), file.output
        return cls(*parts, sides, runtime, window_batch, mode)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.output.names if isinstance(self.output, Classes) else ()

    @property
    def class_colors(self) -> tuple[Color, ...]:
        return self.output.colors if isinstance(self.output, Classes) else ()

    def __call__(self, photos: "ImageSource | Sequence[ImageSource]") -> Tensor | list[Tensor]:
        """Predict for one photograph, or for several of any sizes.

        Args:
            photos: file (JPEG, PNG, WebP; turned upright as its EXIF says) or its bytes, PIL image, uint8
                array [H, W, 3] or [H, W]; or a list of such, or an array [B, H, W, 3]. Transparency is laid
                over white, of 16 bits the upper 8 are used.

        Returns:
            Depth in meters, float32 [H, W], or classes, uint8 [H, W], on the CPU; of several a list.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that cannot be read, another kind of array, or a prediction that is not finite.
        """
        if isinstance(photos, list | tuple) or getattr(photos, "ndim", 0) == 4:
            return [self(photo) for photo in photos]  # type: ignore[union-attr]
        image = read_image(photos, MAX_PIXELS)
        name = str(photos) if isinstance(photos, str | Path) else "the image"
        return self.predict(to_tensor(image), name).cpu()

    @torch.inference_mode()
    def predict(self, pixels: Tensor, name: str = "the image") -> Tensor:
        """Predict for pixels as they are: uint8 [3, H, W] -> [H, W] as above, on the device.

        Raises:
            ValueError: no pixels, too many for mode `whole`, or a prediction that is not finite; the message
                calls the photograph by `name`.
        """

        def decide(averages: Tensor) -> Tensor:
            if not averages.isfinite().all():
                raise ValueError(
                    f"the prediction for {name} is not finite: the head has diverged, or the encoder "
                    "overflows; lower --lr, or use --dtype fp32"
                )
            return self.output.decide(averages)

        pixels = pixels.to(self.runtime.device, non_blocking=True)
        height, width = pixels.shape[-2:]
        if not height or not width:
            raise ValueError(f"{name} has {width} x {height} pixels: it shows nothing")
        if self.mode == "slide":
            return slide(self._averages, pixels, *self.window, self.window_batch, decide)
        if height * width > WHOLE_PIXELS:
            from pixio.images.decoding import DamagedDataError  # needs more than torch

            raise DamagedDataError(
                f"{name} has {width} x {height} pixels, and mode whole takes up to {WHOLE_PIXELS:,} pixels: "
                "use mode slide, or a smaller photograph"
            )
        p = self.frozen.encoder.patch_size
        image = F.pad(normalize(pixels), (0, -width % p, 0, -height % p))
        return decide(self._averages(image[None])[0, :, :height, :width])

    def _averages(self, windows: Tensor) -> Tensor:
        """What is averaged of normalized windows [n, 3, H, W]: float32 [n, O, H, W]."""
        with self.runtime.autocast():
            logits = self.head(self.frozen(windows), windows.shape[-2:])
        return self.output.average(logits)
