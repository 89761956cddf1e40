#!/usr/bin/env bash
# DeepCache's Table 13: Stable Diffusion v1.5 on PartiPrompts, PLMS, guidance 7.5, fp16, branch 1:
# fewer steps against caching, uniform and non-uniform; one image per prompt.
#
#     bash scripts/table13_parti.sh --dry-run      commands, exact MACs, disk, what is missing
#     bash scripts/table13_parti.sh --images 100   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table13

parti() { row "$1" sd --prompts data/prompts/parti.tsv --dtype fp16 "${@:2}"; }

# The paper:                                                                        img/s     x   CLIP
parti "PLMS 50 steps"                                                             # 0.230  1.00  29.51
parti "PLMS 45 steps"  --steps 45                                                 # 0.251  1.09  29.40
parti "PLMS 40 steps"  --steps 40                                                 # 0.307  1.34  29.35
parti "PLMS 35 steps"  --steps 35                                                 # 0.333  1.45  29.24
parti "PLMS 30 steps"  --steps 30                                                 # 0.384  1.67  29.24
parti "PLMS 25 steps"  --steps 25                                                 # 0.470  2.04  29.32
parti "PLMS 20 steps"  --steps 20                                                 # 0.538  2.34  29.15
parti "PLMS 15 steps"  --steps 15                                                 # 0.664  2.89  28.58
parti "Uniform N=2"    --interval 2                                               # 0.333  1.45  29.54
parti "Uniform N=3"    --interval 3                                               # 0.396  1.72  29.50
parti "Uniform N=4"    --interval 4                                               # 0.462  2.01  29.53
parti "Uniform N=5"    --interval 5                                               # 0.494  2.15  29.41
parti "Uniform N=6"    --interval 6                                               # 0.529  2.30  29.30
parti "Uniform N=7"    --interval 7                                               # 0.555  2.41  29.11
parti "Uniform N=8"    --interval 8                                               # 0.582  2.53  28.97
# Centre and power of Table 10:
parti "NonUniform N=2" --interval 2  --schedule centered --center 15  --power 1.5 # 0.333  1.45  29.51
parti "NonUniform N=3" --interval 3  --schedule centered --center 15  --power 1.3 # 0.396  1.72  29.59
parti "NonUniform N=4" --interval 4  --schedule centered --center 15  --power 1.4 # 0.462  2.01  29.57
parti "NonUniform N=5" --interval 5  --schedule centered --center 10  --power 1.5 # 0.494  2.15  29.50
parti "NonUniform N=6" --interval 6  --schedule centered --center 15  --power 1.3 # 0.529  2.30  29.46
parti "NonUniform N=7" --interval 7  --schedule centered --center 15  --power 1.4 # 0.555  2.41  29.42
parti "NonUniform N=8" --interval 8  --schedule centered --center 10  --power 1.4 # 0.582  2.53  29.26

run_table "$@"
