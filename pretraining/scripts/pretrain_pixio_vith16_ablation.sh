#!/usr/bin/env bash
# The paper's public-data ablation: Pixio-H/16 with 4 class tokens and mask blocks of 2 x 2 patches (16 of 64 visible).
#
#   command    cd pretraining && IMAGENET_TARS=/data/imagenet-w21-wds bash scripts/pretrain_pixio_vith16_ablation.sh
#   hardware   16 nodes x 8 GPUs of 80 GB under SLURM
#   hours      about 13 hours on h100 (computed by pixio plan at 40 % MFU); as many steps as the ImageNet recipe
#   expect     k-NN 75.1, NYUv2 RMSE 0.360, KITTI RMSE 2.746, ADE20K 44.8, VOC 80.7 (paper, ablation)
# This is the ImageNet recipe with two flags changed; further flags are passed on and override those below.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_pixio_vith16_imagenet.sh" \
    --job_dir exp/pixio_vith16_ablation --job_name pixio_vith16_ablation --mask_grid 2 --n_cls_tokens 4 "$@"
