#!/usr/bin/env bash
# All tests and the linter, from a bare clone:    bash scripts/test.sh [pytest arguments]
# Slow checks are skipped unless --slow is given; checks that need a GPU skip themselves where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
