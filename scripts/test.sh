#!/usr/bin/env bash
# All tests, the linter and the type checker, from a bare clone:    bash scripts/test.sh [pytest arguments]
# Whole files of tests run beside each other, one more than there are cores, since those on Slurm mostly wait, and four at
# most (-n 0: one after the other, in this process).
# Slow checks are skipped unless --slow is given; checks that need a GPU skip themselves where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
workers=$("$PYTHON" -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
"$PYTHON" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
