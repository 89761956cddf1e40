#!/usr/bin/env bash
# All tests, the linter and the type checker, from a bare clone:    bash scripts/test.sh [pytest arguments]
# Slow checks are skipped unless --slow is given; checks that need a GPU skip themselves where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest "$@"
