"""Pixio: a vision encoder for dense tasks, pre-trained by reconstructing pixels (https://arxiv.org/abs/2512.15715)."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from pixio.images.inference import transform
from pixio.models.builders import *  # noqa: F403
from pixio.models.encoder import PixioViT
from pixio.models.mae import PixioMAE
from pixio.models.registry import create_model, from_pretrained, list_models, load_mae

try:
    __version__ = _version("pixio")
except _PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "PixioMAE",
    "PixioViT",
    "__version__",
    "create_model",
    "from_pretrained",
    "list_models",
    "load_mae",
    "transform",
    *list_models(),
    *list_models(pretraining=True),
]
