#!/usr/bin/env bash
# Pixio-S/16 on one machine with one GPU or several, from ImageNet tars. Our own recipe, not a published one.
#
#   command    cd pretraining && IMAGENET_TARS=/data/imagenet-1k-wds bash scripts/pretrain_pixio_vits16_onegpu.sh
#              a folder of your own images: … --dataset_type folder --data_path /data/photos
#   hardware   one GPU of 24 GB; GPUS=4 for four (then --accum_iter 2 keeps 2,048 images per step)
#   hours      about 8.7 hours on rtx4090 (computed by pixio plan at 40 % MFU); 62,500 steps of 2,048 images = 100 passes over ImageNet-1K
#   expect     no reference number yet
# Further flags are passed on and override those below. The same command resumes a run that was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torchrun --standalone --nproc_per_node "${GPUS:-1}" main_pretrain.py \
    --model pixio_vits16_enc384x12h6_dec256x4h8 --n_cls_tokens 8 --drop_path 0.0 \
    --norm_pix_loss --mask_ratio 0.75 --mask_grid 4 \
    --dataset_type imagenet --data_path "${IMAGENET_TARS-}" \
    --input_size 256 --crop_scale_min 0.2 --num_workers 12 \
    --batch_size 256 --accum_iter 8 --blr 1e-4 --weight_decay 0.05 \
    --epochs 100 --iters_per_epoch 625 --warmup_epochs 10 --save_freq 20 \
    --output_dir runs/pixio_vits16_onegpu \
    "$@"
