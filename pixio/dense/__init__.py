"""From features to depth maps and masks: frozen encoders, heads, sliding windows."""

from pixio.dense.frozen import FrozenEncoder
from pixio.dense.heads import KINDS, DPTHead, LinearHead, SyncedBatchNorm2d, SyncGroup, head_blocks, make_head
from pixio.dense.sliding import slide

__all__ = [
    "KINDS",
    "DPTHead",
    "FrozenEncoder",
    "LinearHead",
    "SyncGroup",
    "SyncedBatchNorm2d",
    "head_blocks",
    "make_head",
    "slide",
]
