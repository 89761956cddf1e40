#!/usr/bin/env bash
# DeepCache and Block Caching at equal MACs on the small models that are shipped here:
#     bash scripts/demo_block_caching.sh [options of python -m lab.study, like --only ddpm_emoji]
# Samples every arm, judges it, draws it, and writes results/block_caching/ (table.md, pictures, records, a page).
# Schedules and scale-shift files are those of checkpoints/block_caching/; those that are not there are made first.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

exec "$PYTHON" -m lab.study block_caching --make "$@"
