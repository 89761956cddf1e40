#!/usr/bin/env bash
# Every table of DeepCache, and Block Caching's Table 1.
#
#     bash scripts/all_tables.sh --dry-run       what each costs, what they share, what is missing here
#     bash scripts/all_tables.sh --images 1000   one after the other; a table that lacks something is left out
# Options are those of the table scripts. What has been sampled and judged is kept; interrupt it as you like.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

"$PYTHON" -m scripts.overview "$@"
for option in "$@"; do
    [ "$option" != --dry-run ] || exit 0
done
left_out=()
for i in 1 2 3 4 5 6 7 8 11 12 13 14; do
    script=$(echo scripts/table"$i"_*.sh)
    bash "$script" "$@" || { status=$?; [ $status -eq 2 ] || exit $status; left_out+=("$script"); }
done
bash scripts/block_caching_table1.sh "$@" || { status=$?; [ $status -eq 2 ] || exit $status; left_out+=(block_caching_table1.sh); }
"$PYTHON" -m eval.table --all
[ ${#left_out[@]} -eq 0 ] || { echo "left out: ${left_out[*]} (their messages are above)" >&2; exit 1; }
