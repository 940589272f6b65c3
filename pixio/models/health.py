"""Whether a masked autoencoder's encoder is healthy, told by the patch tokens that leave its last block.

With too high a learning rate the loss still falls, but one constant direction takes over the residual stream:
the final norm then divides what differs between patches away, and neither probes nor distillation nor
fine-tuning find anything. docs/health.md shows how that looks. Letters: B images, V patches, D width.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_VARIANCE = 0.05  # see docs/health.md for the runs behind it
LOWER_RATE = "The learning rate is likely too high: lower --lr or --blr about fourfold and start again"


@torch.no_grad()
def token_health(tokens: Tensor) -> dict[str, float]:
    """Measure tokens before the final norm; the norm is applied without its scale and shift.

    Args:
        tokens: [B, V, D], of patches, as they leave the last block.

    Returns:
        `mean_square`: of the residual stream, before the norm.
        `variance`: of the normed tokens over images and patches, mean of the features: 1 where their mean is
        0, and near 0 where a constant direction carries everything.
        `within_images`: share of that variance between the patches of one image, 0 to 1.
        `rank`: how many directions share the variance, (trace C)^2 / trace C^2 of the covariance C, 1 to D.
    """
    tokens = tokens.float()
    normed = F.layer_norm(tokens, tokens.shape[-1:])  # [B, V, D]
    centered = normed - normed.mean(dim=(0, 1))
    variance = centered.square().mean()
    within = (normed - normed.mean(dim=1, keepdim=True)).square().mean()
    flat = centered.flatten(0, 1)  # [B * V, D]
    # C or, where tokens are fewer than features, the Gram matrix: both have the same trace of the square
    product = flat.T @ flat if len(flat) > flat.shape[1] else flat @ flat.T
    rank = product.trace().square() / product.square().sum().clamp(min=1e-30)
    values = torch.stack([tokens.square().mean(), variance, within / variance.clamp(min=1e-30), rank])
    return dict(zip(("mean_square", "variance", "within_images", "rank"), values.tolist(), strict=True))


class HealthWatch:
    """Measures the newest tokens of a model in training when asked to, and warns once.

    Args:
        name: of the model, in the warning.
        remedy: what to do about it.
        patience: how many measures in a row are unhealthy when it warns.
    """

    def __init__(self, name: str = "the encoder", remedy: str = LOWER_RATE, patience: int = 1):
        self.name, self.remedy, self.patience = name, remedy, patience
        self._tokens: Tensor | None = None
        self._unhealthy, self._warned = 0, False

    def keep(self, tokens: Tensor) -> None:
        """Remember tokens [B, V, D] in place of older ones; nothing is computed."""
        self._tokens = tokens

    def measure(self) -> dict[str, float]:
        """The `token_health` of what was kept last; once, what is unhealthy is told on stderr."""
        health = token_health(self._tokens)
        self._unhealthy = self._unhealthy + 1 if health["variance"] < LEAST_VARIANCE else 0
        if self._unhealthy >= self.patience and not self._warned:
            self._warned = True
            print(
                f"warning: {self.name} hardly tells patches apart: after the final norm their variance is "
                f"{health['variance']:.2g} (healthy: above {LEAST_VARIANCE}), a constant direction carries "
                f"the rest (mean square of the residual stream {health['mean_square']:.3g}). {self.remedy}; "
                "see docs/health.md",
                file=sys.stderr,
                flush=True,
            )
        return health
