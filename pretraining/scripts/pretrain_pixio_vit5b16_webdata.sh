#!/usr/bin/env bash
# Pixio-5B/16 on curated web images (MetaCLIP-style tars with statistics), the published recipe.
#
#   command    cd pretraining && WEB_TARS=/data/web WEB_STATS=/data/web-stats bash scripts/pretrain_pixio_vit5b16_webdata.sh
#   hardware   32 nodes x 8 GPUs of 80 GB under SLURM
#   hours      about 150 hours on h100 (computed by pixio plan at 40 % MFU); 1,284,000 steps of 16,384 images
#   expect     k-NN 68.4, NYUv2 DPT RMSE 0.238, ADE20K linear mIoU 50.2 (paper, 5B)
# Parameters are sharded within each node, because a copy on every GPU would not fit (`pixio plan`, docs/clusters.md).
# Further flags are passed on and override those below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v sbatch >/dev/null || {
    echo "No SLURM here (sbatch not found), and this recipe needs 256 GPUs. On one machine, run for example" >&2
    echo "  bash scripts/pretrain_pixio_vits16_onegpu.sh" >&2
    exit 1
}

python submitit_pretrain.py \
    --job_dir exp/pixio_vit5b16_webdata --job_name pixio_vit5b16_webdata \
    --nodes 32 --ngpus 8 --timeout 10080 --mem_gb 1600 --parallel hybrid \
    --model pixio_vit5b16_enc3072x48h32_dec512x32h16 --n_cls_tokens 8 --drop_path 0.4 \
    --norm_pix_loss --mask_ratio 0.75 --mask_grid 4 \
    --dataset_type webdataset --data_path "${WEB_TARS:?set it to the folder with the tars}" \
    --json_path "${WEB_STATS:?set it to the folder with their statistics}" \
    --soft_sampling --hist_thresh 4.5 --imgres_thresh 320 \
    --input_size 256 --crop_scale_min 0.2 --num_workers 6 \
    --batch_size 64 --blr 1.25e-5 --weight_decay 0.05 \
    --epochs 800 --iters_per_epoch 1605 --warmup_epochs 80 --save_freq 20 \
    "$@"
