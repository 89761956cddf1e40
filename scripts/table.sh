# Sourced by the table scripts, which then say:
#     table KEY                          of results/paper/deepcache.yaml
#     row "LABEL" PACKAGE OPTIONS        the paper's name of a row, and the options of PACKAGE.sample that give it
#     note "TEXT" ...                    printed below the table
#     run_table "$@"                     plan, sample, print
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

said=(--script "$(basename "$0")")
table() { said+=(--table "$1"); }
row() { said+=(--row "$(printf '%q ' "$@")"); }
note() { said+=(--note "$*"); }
run_table() { exec "$PYTHON" -m scripts.plan "${said[@]}" -- "$@"; }
