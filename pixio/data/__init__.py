"""Training images: where they are, who reads which, and how they become batches."""

from pixio.data.shards import DATASET_TYPES, find_shards
from pixio.data.streams import Curation, DataError, Loader, Stream, open_stream
from pixio.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DamagedDataError,
    crop_box,
    decode,
    decode_crop,
    denormalise,
    normalise,
    random_resized_crop,
    resize_centre_crop,
)

__all__ = [
    "DATASET_TYPES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Curation",
    "DamagedDataError",
    "DataError",
    "Loader",
    "Stream",
    "crop_box",
    "decode",
    "decode_crop",
    "denormalise",
    "find_shards",
    "normalise",
    "open_stream",
    "random_resized_crop",
    "resize_centre_crop",
]
