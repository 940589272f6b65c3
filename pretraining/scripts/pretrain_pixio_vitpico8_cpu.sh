#!/usr/bin/env bash
# Pixio-pico/8 on a laptop's CPU, from rendered scenes: nothing to download. Our own recipe: the demo, larger and an hour long.
#
#   command    cd pretraining && bash scripts/pretrain_pixio_vitpico8_cpu.sh
#              your own images: … --dataset_type folder --data_path /data/photos
#   hardware   two CPU cores
#   hours      measured on one core: 0.35 in bfloat16 (AMD EPYC that computes in it, 332 images/s), 1.4 in float32 (busy AMD EPYC)
#   health     at lr 1e-3 the variance has its minimum, 0.059, at step 880, and ends at 0.18: docs/health.md
#   expect     training loss 0.62, further points in expected_hour.json; what it learns is in docs/hour.md
# Further flags are passed on and override those below. The same command resumes a run that was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ "$*" == *--data_path* ]] || python -m pixio scenes imagenet-tars runs/scenes64 --train 20000 --val 0 --size 64 --workers 2

python main_pretrain.py \
    --model pixio_vitpico8_enc128x6h4_dec128x2h4 --n_cls_tokens 8 \
    --position_init sincos --norm_pix_loss --mask_ratio 0.75 --mask_grid 2 \
    --dataset_type imagenet --data_path runs/scenes64 --input_size 64 --crop_scale_min 0.4 --num_workers 1 \
    --batch_size 64 --lr 1e-3 --weight_decay 0.05 \
    --epochs 60 --iters_per_epoch 100 --warmup_epochs 3 --save_freq 0 --save_minutes 2 \
    --output_dir runs/pixio_vitpico8_cpu \
    "$@"
