"""Pictures of what a model sees and of how a run went, as PNG files.

Letters: B images, H x W pixels, N patches. Colours are RGB uint8.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pixio.data.transforms import denormalise, normalise
from pixio.mae import PixioMAE, patch_statistics, patchify, unpatchify

HIDDEN = 128  # grey of a masked pixel
PANELS = ("original", "masked", "reconstruction", "pasted")


@torch.inference_mode()
def reconstruct(
    mae: PixioMAE, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
) -> dict[str, Tensor]:
    """Mask images and let the model fill them in.

    A model trained on pixels normalised per patch predicts no mean and no contrast; both are taken from the
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
    pixels = normalise(images)
    out = mae(pixels, mask_ratio, noise)
    pred = out.pred.float()
    if mae.norm_pix_loss:
        mean, std = patch_statistics(patchify(pixels, p))
        pred = pred * std + mean
    predicted = denormalise(unpatchify(pred, p, grid))
    hidden = unpatchify(out.mask.unsqueeze(-1).expand(-1, -1, p * p), p, grid) > 0  # [B, 1, H, W]
    return {
        "original": images,
        "masked": torch.where(hidden, torch.full_like(images, HIDDEN), images),
        "reconstruction": predicted,
        "pasted": torch.where(hidden, predicted, images),
    }


def save_sheet(panels: dict[str, Tensor], path: str | Path, names: Sequence[str] | None = None) -> None:
    """Draw one row per image and one titled column per panel.

    Args:
        panels: title -> uint8 [B, 3, H, W], the same B for all.
        path: PNG to write.
        names: a label for each row.
    """
    plt = _pyplot()
    rows, columns = len(next(iter(panels.values()))), len(panels)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2 * columns, 2 * rows + 0.3), squeeze=False, layout="constrained"
    )
    for column, (title, images) in enumerate(panels.items()):
        axes[0, column].set_title(title)
        for row, image in enumerate(images):
            axis = axes[row, column]
            axis.imshow(image.permute(1, 2, 0).cpu().numpy())
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for row, name in enumerate(names or ()):
        axes[row, 0].set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_curves(logs: Sequence[str | Path], path: str | Path) -> None:
    """Draw loss and learning rate over the steps of one or several runs.

    Args:
        logs: `log.jsonl` files, or the folders they lie in.
        path: PNG to write.

    Raises:
        ValueError: a log without any step.
    """
    plt = _pyplot()
    figure, (loss, lr) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=(2, 1))
    for log in map(Path, logs):
        file = log / "log.jsonl" if log.is_dir() else log
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if not rows:
            raise ValueError(f"{file} holds no steps yet")
        steps = [row["step"] for row in rows]
        loss.plot(steps, [row["loss"] for row in rows], linewidth=1.2, label=file.resolve().parent.name)
        lr.plot(steps, [row["lr"] for row in rows], linewidth=1.2)
    loss.set(xlabel="step", ylabel="loss (masked patches)")
    lr.set(xlabel="step", ylabel="learning rate")
    lr.ticklabel_format(axis="y", scilimits=(-2, 2))
    for axis in (loss, lr):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    if len(logs) > 1:
        loss.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
