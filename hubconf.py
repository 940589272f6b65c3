"""Entry points of `torch.hub`: torch.hub.load(folder, "pixio_vith16", source="local", pretrained=...)."""

from pixio import from_pretrained  # noqa: F401
from pixio.models.builders import *  # noqa: F403

dependencies = ["torch"]
