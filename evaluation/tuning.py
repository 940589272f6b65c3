"""Encoders that are trained together with what stands on them: loading, learning rates, export."""

from pathlib import Path

import torch
from torch import nn
from training_loop import TrainingConfig

from pixio.engine.optim import fused_adamw
from pixio.files import write_atomic
from pixio.models.external import fingerprint, load_encoder
from pixio.models.finetuning import layer_decay_groups


def load_trainable(config: TrainingConfig, name: str) -> nn.Module:
    """The encoder of a run, with stochastic depth if it asks for it.

    Raises:
        ValueError, OSError: see `load_encoder`; or an encoder that cannot be trained here.
    """
    library = name.partition("/")[0] if "/" in name else ""
    if config.tunes and library == "hf":
        raise ValueError(
            f"{name} cannot be trained here: convert it (pixio convert), or use --train_blocks 0"
        )
    options = {}
    if config.tunes and config.drop_path:
        options["drop_path_rate" if library == "timm" else "drop_path"] = config.drop_path
    return load_encoder(name, config.pretrained_ckp or None, **options)


def make_optimizer(config: TrainingConfig, head: nn.Module, encoder: nn.Module) -> torch.optim.AdamW:
    """AdamW over a head and, if they learn, the last blocks of its encoder, with rates of their own."""
    if not config.tunes:
        groups = head.parameters()
    else:
        factor = config.peak_encoder_lr / config.lr
        groups = [{"params": list(head.parameters()), "lr_scale": 1.0}]
        for group in layer_decay_groups(encoder, config.weight_decay, config.layer_decay):
            groups.append(group | {"lr_scale": factor * group["lr_scale"]})
    return fused_adamw(groups, config.lr, (0.9, 0.999), config.weight_decay)


def export_encoder(encoder: nn.Module, path: Path) -> str:
    """Write a trained encoder as a file that `load_encoder` reads under its name; returns its fingerprint."""
    state = getattr(encoder, "model", encoder).state_dict()  # of timm's: under timm's keys
    state = {key: value.detach().cpu().clone() for key, value in state.items()}
    write_atomic(path, lambda file: torch.save(state, file))
    return fingerprint(encoder)
