"""Training images: where they are, who reads which, and how they become batches."""

from pixio.data.curation import Curation
from pixio.data.loader import Loader
from pixio.data.read_statistics import DataError
from pixio.data.shards import DATASET_TYPES, find_shards
from pixio.data.stream import Stream, open_stream

__all__ = ["DATASET_TYPES", "Curation", "DataError", "Loader", "Stream", "find_shards", "open_stream"]
