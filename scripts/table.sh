#!/usr/bin/env bash
# A table of configs/papers/*.yaml or configs/papers/own/*.yaml by its name; scripts/tableN_*.sh are the doors to it.
#
#     bash scripts/table.sh table1 --dry-run      commands, exact MACs, disk, what is missing
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
exec "$PYTHON" -m lab.study.papers "$@"
