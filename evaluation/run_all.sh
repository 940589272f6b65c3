#!/usr/bin/env bash
# All ten dense evaluations and k-NN of one encoder: eleven SLURM jobs, or without SLURM one after another on this machine.
#
#   bash run_all.sh pixio_vith16 pixio_vith16.pth
#   GPUS=8 bash run_all.sh …                          one after another on this machine, even with SLURM
#   python collect_results.py                         one table of all results, with the published numbers
# DENSE_FLAGS and KNN_FLAGS are appended to the commands, SBATCH_FLAGS to sbatch: DENSE_FLAGS="--epochs 1" bash …
set -euo pipefail
if [ $# -ne 2 ]; then
    echo "usage: run_all.sh ENCODER WEIGHTS   (WEIGHTS none: random weights)" >&2
    exit 2
fi
here="$(realpath "$(dirname "${BASH_SOURCE[0]}")")"
source "$here/launch_common.sh"
encoder="$1" weights="$(absolute "$2")"
cd "$here"

: "${SBATCH_FLAGS:=}" "${DENSE_FLAGS:=}" "${KNN_FLAGS:=}"
start=(bash)
if [ -z "${GPUS:-}" ] && command -v sbatch >/dev/null; then
    read -ra start <<<"sbatch ${SBATCH_FLAGS//$'\n'/ }"
fi
read -ra dense_flags <<<"${DENSE_FLAGS//$'\n'/ }"
read -ra knn_flags <<<"${KNN_FLAGS//$'\n'/ }"
failed=()
for task in monodepth semseg; do
    for config in "$task"/configs/*.yaml; do
        "${start[@]}" "launch_$task.sh" "$config" "$encoder" "$weights" ${dense_flags[@]+"${dense_flags[@]}"} ||
            failed+=("$config")
    done
done
"${start[@]}" launch_knn.sh "$encoder" "$weights" ${knn_flags[@]+"${knn_flags[@]}"} || failed+=("k-NN")

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
