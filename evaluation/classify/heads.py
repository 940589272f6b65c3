"""What stands on the encoder in classification. Letters: B images, N patches, C class tokens, D width."""

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from pixio.dense import SyncedBatchNorm2d, SyncGroup
from pixio.models.finetuning import set_training

PROBES = ("linear", "attentive")
_HEAD_WIDTH = 64  # channels of an attention head, at most


class LinearProbe(nn.Module):
    """BatchNorm without weights and one linear map of the mean class token, as MAE's linear probe.

    Encoders without class tokens give the mean patch token.
    """

    def __init__(self, width: int, classes: int, ranks: SyncGroup | None = None):
        super().__init__()
        self.norm = SyncedBatchNorm2d(width, ranks, affine=False, eps=1e-6)
        self.predict = _classifier(width, classes)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Features of the last block -> logits [B, classes]."""
        cls = features["cls_tokens_norm"]  # [B, C, D]
        x = (cls if cls.shape[1] else features["patch_tokens_norm"]).mean(1)  # [B, D]
        return self.predict(self.norm(x[:, :, None, None]).flatten(1))


class AttentiveProbe(nn.Module):
    """A learned query that attends to all tokens, an MLP, and one linear map."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        heads = max(width // _HEAD_WIDTH, 1)
        self.pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        self.predict = _classifier(width, classes)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Features of the last block -> logits [B, classes]."""
        tokens = torch.cat([features["cls_tokens_norm"], features["patch_tokens_norm"]], dim=1)
        return self.predict(self.pool(tokens.float()))  # [B, C + N, D] -> [B, D] -> [B, classes]


def make_probe(kind: str, width: int, classes: int, ranks: SyncGroup | None = None) -> nn.Module:
    """A fresh probe; `ranks` share the BatchNorm statistics of a linear one."""
    return LinearProbe(width, classes, ranks) if kind == "linear" else AttentiveProbe(width, classes)


def _classifier(width: int, classes: int) -> nn.Linear:
    linear = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear


class Classifier(nn.Module):
    """An encoder with a probe on it: normalized images [B, 3, H, W] -> logits [B, classes]."""

    def __init__(self, encoder: nn.Module, probe: nn.Module):
        super().__init__()
        self.encoder, self.probe = encoder, probe

    def train(self, mode: bool = True) -> "Classifier":
        """Switch the probe and the blocks that learn; frozen ones stay in evaluation mode."""
        self.training = mode
        self.probe.train(mode)
        set_training(self.encoder, mode)
        return self

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Of the last block: tokens [B, C or N, D]."""
        return self.encoder(images, [len(self.encoder.blocks) - 1])[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.probe(self.features(images))
