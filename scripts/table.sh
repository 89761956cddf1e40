# Sourced by the table scripts, which then say:
#     table NAME                         of results/paper/*.yaml
#     own_table NAME IMAGES "TITLE"      or, of no paper: the rows are those that follow, of so many images each
#     section NAME                       of that table, for the rows that follow; only where it has sections
#     row "LABEL" PACKAGE OPTIONS        the paper's name of a row, and the options of PACKAGE.sample that give it; a
#                                        row of ours alone names the paper's row that it stands beside before " / "
#     later "LABEL" "REASON"             a row that cannot be run yet
#     run_table "$@"                     plan, sample, judge, print
# These lines are the one place that says which command gives which row: eval.table asks the scripts for them (--rows).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

said=(--script "$(basename "$0")")
in_section=""
table() { said+=(--table "$1"); }
own_table() { said+=(--table "$1" --own "$2" "$3"); }
section() { in_section=$1; }
row() { said+=(--row "$(printf '%q ' "$in_section" "$@")"); }
later() { said+=(--later "$(printf '%q ' "$in_section" "$@")"); }
run_table() {
    if [ "${1:-}" = --rows ]; then
        printf '%s\0' "${said[@]}"
        exit
    fi
    source scripts/environment.sh
    exec "$PYTHON" -m scripts.plan "${said[@]}" -- "$@"
}
