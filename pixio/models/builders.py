"""The table of models, small to large: every encoder, and every encoder with its pre-training decoder.

Released sizes carry published weights; `atto`, `femto`, `pico`, `ti` and `s` are ours, for laptops and single
GPUs, and carry none. Those that end in 8 have patches of 8 pixels and images of 64: a CPU trains them in
minutes. A pre-training name holds both halves:
`enc<width>x<blocks>h<heads>_dec<width>x<blocks>h<heads>`. The published recipes use the 512-wide, 32-block
decoder; at equal batch it costs 7 % of the FLOPs beside the 5B encoder but 80 % beside B, so small encoders
get a lighter one here. A model is added by adding its lines; `pixio.list_models()` and `import pixio` follow.
"""

from pixio.models.registry import encoder_builder as _encoder
from pixio.models.registry import mae_builder as _mae

pixio_vitatto8 = _encoder("pixio_vitatto8", 48, 3, 2, patch_size=8, img_size=64)
pixio_vitfemto8 = _encoder("pixio_vitfemto8", 64, 4, 2, patch_size=8, img_size=64)
pixio_vitpico8 = _encoder("pixio_vitpico8", 128, 6, 4, patch_size=8, img_size=64)
pixio_vitfemto16 = _encoder("pixio_vitfemto16", 64, 4, 2)
pixio_vitpico16 = _encoder("pixio_vitpico16", 128, 6, 4)
pixio_vitti16 = _encoder("pixio_vitti16", 192, 12, 3)
pixio_vits16 = _encoder("pixio_vits16", 384, 12, 6)
pixio_vitb16 = _encoder("pixio_vitb16", 768, 12, 12)
pixio_vitl16 = _encoder("pixio_vitl16", 1024, 24, 16)
pixio_vith16 = _encoder("pixio_vith16", 1280, 32, 16)
pixio_vit1b16 = _encoder("pixio_vit1b16", 1536, 48, 24)
pixio_vit5b16 = _encoder("pixio_vit5b16", 3072, 48, 32)

pixio_vitatto8_enc48x3h2_dec48x1h2 = _mae("pixio_vitatto8_enc48x3h2_dec48x1h2", pixio_vitatto8)
pixio_vitfemto8_enc64x4h2_dec64x2h2 = _mae("pixio_vitfemto8_enc64x4h2_dec64x2h2", pixio_vitfemto8)
pixio_vitpico8_enc128x6h4_dec128x2h4 = _mae("pixio_vitpico8_enc128x6h4_dec128x2h4", pixio_vitpico8)
pixio_vitfemto16_enc64x4h2_dec64x1h2 = _mae("pixio_vitfemto16_enc64x4h2_dec64x1h2", pixio_vitfemto16)
pixio_vitpico16_enc128x6h4_dec128x2h4 = _mae("pixio_vitpico16_enc128x6h4_dec128x2h4", pixio_vitpico16)
pixio_vitti16_enc192x12h3_dec128x4h4 = _mae("pixio_vitti16_enc192x12h3_dec128x4h4", pixio_vitti16)
pixio_vits16_enc384x12h6_dec256x4h8 = _mae("pixio_vits16_enc384x12h6_dec256x4h8", pixio_vits16)
pixio_vitb16_enc768x12h12_dec512x8h16 = _mae("pixio_vitb16_enc768x12h12_dec512x8h16", pixio_vitb16)
pixio_vitl16_enc1024x24h16_dec512x16h16 = _mae("pixio_vitl16_enc1024x24h16_dec512x16h16", pixio_vitl16)
pixio_vith16_enc1280x32h16_dec512x32h16 = _mae("pixio_vith16_enc1280x32h16_dec512x32h16", pixio_vith16)
pixio_vit1b16_enc1536x48h24_dec512x32h16 = _mae("pixio_vit1b16_enc1536x48h24_dec512x32h16", pixio_vit1b16)
pixio_vit5b16_enc3072x48h32_dec512x32h16 = _mae("pixio_vit5b16_enc3072x48h32_dec512x32h16", pixio_vit5b16)
