"""Semantic segmentation: the training loss and the mean intersection over union."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pixio.images.targets import IGNORE


def segmentation_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored; 0 where all are.

    Args:
        logits: float32 [B, O, H, W].
        mask: classes, uint8 [B, H, W], 255 = ignored.
    """
    total = F.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="sum")
    return total / (mask != IGNORE).sum().clamp(min=1)


class SegmentationScores:
    """The confusion matrix of a data set, and what follows from it.

    Attributes:
        state: what a rank knows: `confusion` int64 [O, O], rows true, columns predicted, and `images`.
    """

    def __init__(self, nclass: int):
        self.nclass = nclass
        self.state = {"confusion": torch.zeros(nclass, nclass, dtype=torch.int64), "images": 0}

    def add(self, index: int, prediction: Tensor, target: Tensor) -> None:
        """Score an image.

        Args:
            index: of the image in the data set.
            prediction: classes, any integers [H, W].
            target: classes, [H, W], 255 = ignored.
        """
        scored = target != IGNORE
        cells = target[scored].long() * self.nclass + prediction[scored]
        self.state["confusion"] += cells.bincount(minlength=self.nclass**2).view(self.nclass, -1).cpu()
        self.state["images"] += 1

    @staticmethod
    def summarize(states: list[dict]) -> dict[str, float | int | list[float | None]]:
        """Intersection over union from the sums over the images of all ranks.

        Returns:
            `miou` in percent, the mean over the classes that occur in truth or prediction; `iou`, per class,
            None for one that does not occur; `images`.

        Raises:
            ValueError: no pixel is scored.
        """
        confusion = sum(state["confusion"] for state in states).double()
        intersection = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - intersection
        occurs = union > 0
        if not occurs.any():
            raise ValueError(f"all pixels of the validation masks are {IGNORE}: there is nothing to score")
        iou = 100 * intersection / union
        return {
            "miou": iou[occurs].mean().item(),
            "iou": [value.item() if there else None for value, there in zip(iou, occurs, strict=True)],
            "images": sum(state["images"] for state in states),
        }
