#!/usr/bin/env bash
# Pixio-H/16 on ImageNet-1K or -21K, the published recipe (paper, public data).
#
#   command    cd pretraining && IMAGENET_TARS=/data/imagenet-1k-wds bash scripts/pretrain_pixio_vith16_imagenet.sh
#   hardware   16 nodes x 8 GPUs of 80 GB under SLURM; with fewer, keep 8,192 images per step with --accum_iter
#   hours      about 13 hours on h100 (computed by pixio plan at 40 % MFU); 642,000 steps
#   expect     no published number for these exact settings; pretrain_pixio_vith16_ablation.sh has one
# Further flags are passed on and override those below: … --partition gpu --account mine --epochs 100
# The same command resumes a run that ended early; the logs of all attempts are in exp/….
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v sbatch >/dev/null || {
    echo "No SLURM here (sbatch not found). On one machine, run main_pretrain.py with the same flags, for example" >&2
    echo "  bash scripts/pretrain_pixio_vits16_onegpu.sh" >&2
    exit 1
}

python submitit_pretrain.py \
    --job_dir exp/pixio_vith16_imagenet --job_name pixio_vith16_imagenet \
    --nodes 16 --ngpus 8 --timeout 10080 --mem_gb 1600 \
    --model pixio_vith16_enc1280x32h16_dec512x32h16 --n_cls_tokens 8 --drop_path 0.4 \
    --norm_pix_loss --mask_ratio 0.75 --mask_grid 4 \
    --dataset_type imagenet --data_path "${IMAGENET_TARS-}" \
    --input_size 256 --crop_scale_min 0.2 --num_workers 6 \
    --batch_size 64 --blr 2.5e-5 --weight_decay 0.05 \
    --epochs 400 --iters_per_epoch 1605 --warmup_epochs 40 --save_freq 20 \
    "$@"
