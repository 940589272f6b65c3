"""Train part of an encoder: which of its blocks learn, and how fast.

Letters: n trained blocks, L blocks of the encoder.
"""

from typing import Any

from torch import nn


def train_last_blocks(encoder: nn.Module, count: int | None) -> None:
    """Let the last blocks and the final norm require gradients, and nothing else.

    Args:
        encoder: any of `pixio.models.external.load_encoder`.
        count: n; 0 freezes all, None trains all, the embeddings too.

    Raises:
        ValueError: the encoder has fewer blocks.
    """
    depth = len(encoder.blocks)
    if count is not None and not 0 <= count <= depth:
        raise ValueError(f"{count} blocks to train: the encoder has {depth}, choose 0 to {depth} or all")
    encoder.requires_grad_(count is None)
    if count:
        encoder.norm.requires_grad_(True)
        for block in encoder.blocks[depth - count :]:
            block.requires_grad_(True)


def set_training(encoder: nn.Module, mode: bool) -> None:
    """`encoder.train(mode)`, but frozen blocks stay in evaluation mode: no stochastic depth there."""
    encoder.train(mode and learns(encoder))
    for block in encoder.blocks:
        if not learns(block):
            block.eval()


def learns(module: nn.Module) -> bool:
    """Whether any of its parameters requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def layer_decay_groups(encoder: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer whose learning rate falls from the last block to the embeddings.

    As in BEiT and MAE (https://github.com/facebookresearch/mae), in timm's numbering: the embeddings are
    layer 0, block i is layer i + 1, the final norm belongs to the last block, and what comes after the
    encoder would be layer L + 1, with the full learning rate.

    Args:
        encoder: of which the parameters that require gradients are taken.
        weight_decay: of all but biases, norms and what `encoder.no_weight_decay()` names.
        layer_decay: factor from each layer to the one before.

    Returns:
        Groups with `params`, `weight_decay` and `lr_scale`, the factor of the learning rate.
    """
    depth = len(encoder.blocks)
    layers = {id(p): i + 1 for i, block in enumerate(encoder.blocks) for p in block.parameters()}
    layers |= {id(p): depth for p in encoder.norm.parameters()}
    undecayed = encoder.no_weight_decay() if hasattr(encoder, "no_weight_decay") else set()
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or name.endswith(".bias") or name in undecayed
            key = layers.get(id(parameter), 0), 0.0 if exempt else weight_decay
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, "lr_scale": layer_decay ** (depth + 1 - layer)}
        for (layer, decay), params in sorted(groups.items(), key=lambda item: item[0])
    ]
