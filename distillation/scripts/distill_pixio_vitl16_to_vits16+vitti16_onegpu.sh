#!/usr/bin/env bash
# Pixio-S/16 and Pixio-Ti/16 from the released L/16 on one machine with one GPU or several. Our own recipe, not a published one.
#
#   command    cd distillation && TEACHER=/weights/pixio_vitl16.pth IMAGENET_TARS=/data/imagenet-1k-wds \
#                  bash scripts/distill_pixio_vitl16_to_vits16+vitti16_onegpu.sh
#              a folder of your own images: … --dataset_type folder --data_path /data/photos
#   hardware   one GPU of 24 GB; GPUS=4 for four (then --accum_iter 2 keeps 1,024 images per step)
#   hours      about 120 hours on rtx4090 (computed by pixio plan at 40 % MFU); 125,000 steps of 1,024 images = 100 passes over ImageNet-1K
#   expect     no reference number yet
# Further flags are passed on and override those below. The same command resumes a run that was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torchrun --standalone --nproc_per_node "${GPUS:-1}" main_distill.py \
    --teacher_model pixio_vitl16 --teacher_pretrained "${TEACHER:?set it to the weight file of the teacher}" \
    --student_models pixio_vits16 pixio_vitti16 --drop_path 0.0 --mask_ratio 0 \
    --loss_fn_cls cosine --loss_fn_patch cosine --loss_fuse avg \
    --dataset_type imagenet --data_path "${IMAGENET_TARS-}" \
    --input_size 256 --crop_scale_min 0.2 --num_workers 12 \
    --batch_size 128 --accum_iter 8 --lr 1e-3 --weight_decay 0.05 \
    --epochs 100 --iter_per_epoch 1250 --warmup_epochs 10 --save_freq 20 \
    --output_dir runs/pixio_vits16+vitti16_onegpu \
    "$@"
