#!/usr/bin/env bash
# Caching, forecasts and fewer steps at equal cost on the small models that are shipped here:    bash scripts/demo.sh
# Samples every arm, judges it, times it, and writes results/demo_short/: a page to look at, table, pictures, records. Three
# to five minutes on 2 cores after installation; what is there can be looked at all along, and a second run goes on.
#     bash scripts/demo.sh --full     all that results/demo/ holds: about 40 minutes
# Other options are those of python -m lab.study, like --only ldm_emoji or --images 80. Needs Python 3.11 or later and
# nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

study=demo_short
[ "${1:-}" != --full ] || { study=demo; shift; }
exec "$PYTHON" -m lab.study "$study" --jobs 0 --device cpu --batch-size 8 "$@"
