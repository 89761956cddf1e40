#!/usr/bin/env bash
# Fetch what the papers' tables need: checksums, resumed where it broke off, whole or not at all, never over a file.
#
#     bash scripts/download.sh --list          what there is, and what is here already
#     bash scripts/download.sh ldm_cin256 inception imagenet_reference
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

exec "$PYTHON" -m scripts.download "$@"
