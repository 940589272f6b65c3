# Sourced by launch_*.sh, which set `here` to this folder. Starts a program of this folder under SLURM, on several GPUs
# of one node (GPUS=4 bash launch_….sh …), or in one process.

# A path as seen from where the job was submitted; a name that is not a file is returned unchanged.
absolute() {
    if [ -e "$1" ]; then realpath -- "$1"; else printf '%s\n' "$1"; fi
}

# launch PROGRAM ARGUMENTS…, in this folder, where data/ and runs/ are.
launch() {
    cd "$here"
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not inherit it from sbatch
        # The signal that the header requests, sent before a time limit or a preemption: requeue the job. The next
        # attempt resumes from the last checkpoint.
        trap 'scontrol requeue "$SLURM_JOB_ID" || true' USR2
        srun --kill-on-bad-exit=1 python "$@" &
        local status=0
        wait $! || status=$?
        while [ -n "$(jobs -pr)" ]; do # the signal interrupts wait; a job that cannot be requeued runs on
            status=0
            wait $! || status=$?
        done
        exit $status
    elif [ "${GPUS:-1}" -gt 1 ]; then
        exec torchrun --standalone --nproc_per_node "$GPUS" "$@"
    fi
    exec python "$@"
}
