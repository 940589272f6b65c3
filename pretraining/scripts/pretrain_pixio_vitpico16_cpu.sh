#!/usr/bin/env bash
# Pixio-pico/16 on a laptop's CPU, from rendered scenes: nothing to download, the whole path in minutes. Ours.
#
#   command    cd pretraining && bash scripts/pretrain_pixio_vitpico16_cpu.sh
#              your own images: … --dataset_type folder --data_path /data/photos
#   hardware   two CPU cores
#   hours      minutes: model and run have the size of those of `make demo`
#   expect     `make demo` prints what such an encoder knows about its scenes
# Further flags are passed on, and the last one wins. The same command resumes a run that was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python main_pretrain.py \
    --model pixio_vitpico16_enc128x6h4_dec128x2h4 --n_cls_tokens 8 \
    --norm_pix_loss --mask_ratio 0.625 --mask_grid 2 \
    --dataset_type scenes --input_size 128 --crop_scale_min 0.5 --num_workers 1 \
    --batch_size 64 --lr 4e-3 --weight_decay 0.05 \
    --epochs 15 --iters_per_epoch 100 --warmup_epochs 2 --save_freq 0 --save_minutes 2 \
    --output_dir runs/pixio_vitpico16_cpu \
    "$@"
