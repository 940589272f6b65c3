"""The loss on images that are never trained on, with masks that are the same at every evaluation and in every
run."""

from pathlib import Path

import torch
from torch import nn

from pixio.engine.runtime import Runtime
from pixio.images.inference import Transform
from pixio.images.listing import list_files
from pixio.images.normalization import normalize
from pixio.models.mae import PixioMAE
from pixio.models.masking import cell_grid


class HeldOut:
    """Images of a folder, resized to squares, and one mask for each.

    The same weights give the same loss bit for bit, whatever the run's seed, step and number of ranks: every
    rank computes all of it, in the same batches.

    Args:
        folder: with images in or below it, of which the first `limit` in the order of their names are used.
        mae: the model, for its sizes.
        mask_ratio: share of masked cells.
        limit: images.

    Raises:
        FileNotFoundError: no image is there.
        ValueError: one that cannot be read.
    """

    def __init__(self, folder: str, mae: PixioMAE, mask_ratio: float, limit: int = 256):
        names = list_files(folder)[:limit]
        if not names:
            raise FileNotFoundError(f"--val_data {Path(folder).absolute()} holds no images")
        encoder = mae.encoder
        transform = Transform(encoder.img_size[0], patch_size=encoder.patch_size)
        self.images = torch.stack([transform.pixels(Path(folder, name))[0] for name in names])  # [n, 3, S, S]
        rows, columns = cell_grid(encoder.grid, mae.mask_grid)
        self.noise = torch.rand(len(names), rows * columns, generator=torch.Generator().manual_seed(0))
        self.mask_ratio = mask_ratio

    @torch.no_grad()
    def loss(self, runtime: Runtime, model: nn.Module, batch_size: int = 64) -> float:
        """Collective: the mean loss. With pixels normalized per patch, 1 - loss is the share of the masked
        patches' structure that the model explains; a patch's mean explains 0."""
        total = torch.zeros((), device=runtime.device)
        model.eval()
        for images, noise in zip(self.images.split(batch_size), self.noise.split(batch_size), strict=True):
            with runtime.autocast():
                pixels = normalize(images.to(runtime.device))
                total += len(images) * model(pixels, self.mask_ratio, noise.to(runtime.device)).loss
            runtime.heartbeat()
        model.train()
        return total.item() / len(self.images)
