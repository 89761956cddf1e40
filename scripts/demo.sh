#!/usr/bin/env bash
# Caching, forecasts and fewer steps at equal cost on the small models that are shipped here:    bash scripts/demo.sh
# Samples every arm, judges it, times it, and writes results/demo_short/: a page to look at, table, pictures, JSONs. Three
# to five minutes on 2 cores after installation; what is there can be looked at all along, and a second run goes on.
#     bash scripts/demo.sh --full     all that results/demo/ holds: about 40 minutes
# Needs Python 3.11 or later and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

exec "$PYTHON" -m scripts.demo "$@"
