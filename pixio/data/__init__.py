"""Training images: where they are, who reads which, and how they become batches."""

from pixio.data.loader import Curation, DataError, Loader, Stream, open_stream
from pixio.data.shards import DATASET_TYPES, find_shards

__all__ = ["DATASET_TYPES", "Curation", "DataError", "Loader", "Stream", "find_shards", "open_stream"]
