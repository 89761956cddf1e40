#!/usr/bin/env bash
# DeepCache's Table 10: centre and power of Stable Diffusion's non-uniform schedules. Settings: this prints the full
# steps that they give and their MACs; scripts/table13_parti.sh and table14_coco.sh sample them.
#
#     bash scripts/table10_sd_schedules.sh
source "$(dirname "$0")/table.sh"
table table10

section first
row "N=2" sd --interval 2  --schedule centered --center 15  --power 1.5
row "N=3" sd --interval 3  --schedule centered --center 15  --power 1.3
row "N=4" sd --interval 4  --schedule centered --center 15  --power 1.4
row "N=5" sd --interval 5  --schedule centered --center 10  --power 1.5
row "N=6" sd --interval 6  --schedule centered --center 15  --power 1.3
row "N=7" sd --interval 7  --schedule centered --center 15  --power 1.4
row "N=8" sd --interval 8  --schedule centered --center 10  --power 1.4

section second
row "N=2" sd --interval 2  --schedule centered --center 20  --power 1.3
row "N=3" sd --interval 3  --schedule centered --center 20  --power 1.4
row "N=4" sd --interval 4  --schedule centered --center 20  --power 1.4
row "N=5" sd --interval 5  --schedule centered --center 15  --power 1.3
row "N=6" sd --interval 6  --schedule centered --center 15  --power 1.5
row "N=7" sd --interval 7  --schedule centered --center 15  --power 1.5
row "N=8" sd --interval 8  --schedule centered --center 20  --power 1.3

run_table "$@"
