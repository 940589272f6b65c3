"""Entry points of `torch.hub`: torch.hub.load(folder, "pixio_vith16", source="local", pretrained=...)."""

from pixio import (  # noqa: F401
    from_pretrained,
    pixio_vit1b16,
    pixio_vit5b16,
    pixio_vitb16,
    pixio_vitfemto16,
    pixio_vith16,
    pixio_vitl16,
    pixio_vitpico16,
    pixio_vits16,
    pixio_vitti16,
)

dependencies = ["torch"]
