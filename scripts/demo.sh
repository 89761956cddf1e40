#!/usr/bin/env bash
# DeepCache on the small models that are shipped here, end to end:    bash scripts/demo.sh [--quick]
# Samples every arm, judges it, times it, and writes results/demo/ (table.md, pictures, one JSON per arm).
# Needs Python 3.11 to 3.13 and nothing else; about half an hour on 2 cores after installation (--quick: five minutes).
# A second run reuses the images.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

exec "$PYTHON" -m scripts.demo "$@"
