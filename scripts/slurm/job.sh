# Sourced by every job, in the root of the repository. What your cluster needs goes here: module load, proxies, ...
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}        # CPU threads of PyTorch
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=30           # logs that can be followed, and stay short
echo "job $SLURM_JOB_ID on $(hostname), $(date), restarts: ${SLURM_RESTART_COUNT:-0}"
