# Sourced by every job, in the root of the repository. What your cluster needs goes here: module load, proxies, ...
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}        # CPU threads of PyTorch
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=30           # logs that can be followed, and stay short
echo "job $SLURM_JOB_ID on $(hostname), $(date), restarts: ${SLURM_RESTART_COUNT:-0}"

# Runs a command, hands it the signals that sample.sbatch names, and ends the job with its status.
run_until_stopped() {
    local again="" status
    "$@" &
    command=$!
    trap 'again=yes; kill -USR1 "$command"' USR1
    trap 'kill -TERM "$command"' TERM
    while kill -0 "$command" 2>/dev/null; do    # a signal ends `wait`, not the command
        wait "$command"
    done
    wait "$command"
    status=$?
    echo "exit status $status, $(date)"
    # 75: stopped after a batch; 138: by USR1 before it could begin. The bound is for a limit in which nothing gets done.
    if [ "$again" ] && { [ $status -eq 75 ] || [ $status -eq 138 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit $status
}
