#!/usr/bin/env bash
# DeepCache and Block Caching at equal MACs on the small models that are shipped here:
#     bash scripts/demo_block_caching.sh [--models ddpm ldm] [--images 128] [--remake]
# Samples every arm, judges it, draws it, and writes results/block_caching/ (table.md, pictures, one JSON per arm).
# Schedules and scale-shift files are those of checkpoints/block_caching/; --remake makes them anew (lab.fit).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

exec "$PYTHON" -m scripts.block_caching_demo "$@"
