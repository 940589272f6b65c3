"""Pixio: a vision encoder for dense tasks, pre-trained by reconstructing pixels (https://arxiv.org/abs/2512.15715)."""

from pixio.images.inference import transform
from pixio.models.encoder import PixioViT
from pixio.models.mae import PixioMAE
from pixio.models.registry import (
    create_model,
    from_pretrained,
    list_models,
    pixio_vit1b16,
    pixio_vit1b16_enc1536x48h24_dec512x32h16,
    pixio_vit5b16,
    pixio_vit5b16_enc3072x48h32_dec512x32h16,
    pixio_vitb16,
    pixio_vitb16_enc768x12h12_dec512x8h16,
    pixio_vitfemto16,
    pixio_vitfemto16_enc64x4h2_dec64x1h2,
    pixio_vith16,
    pixio_vith16_enc1280x32h16_dec512x32h16,
    pixio_vitl16,
    pixio_vitl16_enc1024x24h16_dec512x16h16,
    pixio_vitpico16,
    pixio_vitpico16_enc128x6h4_dec128x2h4,
    pixio_vits16,
    pixio_vits16_enc384x12h6_dec256x4h8,
    pixio_vitti16,
    pixio_vitti16_enc192x12h3_dec128x4h4,
)
from pixio.weights.reading import load_mae

__all__ = [
    "PixioMAE",
    "PixioViT",
    "create_model",
    "from_pretrained",
    "list_models",
    "load_mae",
    "pixio_vit1b16",
    "pixio_vit1b16_enc1536x48h24_dec512x32h16",
    "pixio_vit5b16",
    "pixio_vit5b16_enc3072x48h32_dec512x32h16",
    "pixio_vitb16",
    "pixio_vitb16_enc768x12h12_dec512x8h16",
    "pixio_vitfemto16",
    "pixio_vitfemto16_enc64x4h2_dec64x1h2",
    "pixio_vith16",
    "pixio_vith16_enc1280x32h16_dec512x32h16",
    "pixio_vitl16",
    "pixio_vitl16_enc1024x24h16_dec512x16h16",
    "pixio_vitpico16",
    "pixio_vitpico16_enc128x6h4_dec128x2h4",
    "pixio_vits16",
    "pixio_vits16_enc384x12h6_dec256x4h8",
    "pixio_vitti16",
    "pixio_vitti16_enc192x12h3_dec128x4h4",
    "transform",
]
