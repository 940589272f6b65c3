"""From features to depth maps and masks: encoders, heads, sliding windows, the predictor."""

from pixio.dense.frozen import FeatureMaps, FrozenEncoder, TunedEncoder
from pixio.dense.head_file import HeadFile, is_head, read_head, window_of
from pixio.dense.heads import KINDS, DPTHead, LinearHead, SyncedBatchNorm2d, SyncGroup, head_blocks, make_head
from pixio.dense.outputs import Classes, Depth, Output
from pixio.dense.predictor import Predictor
from pixio.dense.sliding import slide

__all__ = [
    "KINDS",
    "Classes",
    "DPTHead",
    "Depth",
    "FeatureMaps",
    "FrozenEncoder",
    "HeadFile",
    "LinearHead",
    "Output",
    "Predictor",
    "SyncGroup",
    "SyncedBatchNorm2d",
    "TunedEncoder",
    "head_blocks",
    "is_head",
    "make_head",
    "read_head",
    "slide",
    "window_of",
]
