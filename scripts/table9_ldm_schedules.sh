#!/usr/bin/env bash
# DeepCache's Table 9: centre and power of LDM-4-G's non-uniform schedules. Settings: this prints the full steps that
# they give and their MACs; scripts/table11_uniform_nonuniform.sh samples them.
#
#     bash scripts/table9_ldm_schedules.sh
source "$(dirname "$0")/table.sh"
table table9

row "N=2"  ldm --interval 2  --schedule centered --center 120 --power 1.2
row "N=3"  ldm --interval 3  --schedule centered --center 120 --power 1.2
row "N=5"  ldm --interval 5  --schedule centered --center 110 --power 1.4
row "N=10" ldm --interval 10 --schedule centered --center 110 --power 1.2
row "N=20" ldm --interval 20 --schedule centered --center 120 --power 1.4

run_table "$@"
