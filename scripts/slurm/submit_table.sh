#!/usr/bin/env bash
# A whole table as Slurm jobs: an array per row that samples, an evaluation per row, the table.
#
#     bash scripts/slurm/submit_table.sh table1_ldm_imagenet --dry-run     the sbatch lines; nothing is submitted
#     bash scripts/slurm/submit_table.sh table1_ldm_imagenet               prints the ids of the jobs
# Run it again at any time: only what is missing, and not queued yet, is submitted. More: scripts/slurm/README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh

exec "$PYTHON" -m scripts.slurm.submit "$@"
