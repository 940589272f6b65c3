#!/usr/bin/env bash
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --mem=1200G
#SBATCH --time=7-00:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
# Segmentation with a frozen encoder on one node; docs/evaluation.md.
#
#   sbatch launch_semseg.sh semseg/configs/ade20k_linear.yaml pixio_vith16 pixio_vith16.pth
#   sbatch --account mine --qos high launch_semseg.sh …           with options for your cluster
#   GPUS=8 bash launch_semseg.sh …                                without SLURM; without GPUS, one process
# Submit it from this folder or from the root of the repository.
# Further flags are passed on and override the defaults: … --data_root /data/ade20k --num_workers 8
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: launch_semseg.sh CONFIG ENCODER WEIGHTS [FLAGS…]   (WEIGHTS none: random weights)" >&2
    exit 2
fi
# SLURM runs a copy of this script from elsewhere: look where the job was submitted, or in evaluation/ below it.
here="$(realpath "$(dirname "${BASH_SOURCE[0]}")")"
[ -f "$here/launch_common.sh" ] || here="$SLURM_SUBMIT_DIR"
[ -f "$here/launch_common.sh" ] || here="$here/evaluation"
source "$here/launch_common.sh"

launch eval_semseg.py --config "$(absolute "$1")" --encoder "$2" --pretrained_ckp "$(absolute "$3")" "${@:4}"
