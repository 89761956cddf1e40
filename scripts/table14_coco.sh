#!/usr/bin/env bash
# DeepCache's Table 14: Stable Diffusion v1.5 on COCO 2017's captions, PLMS, guidance 7.5, fp16, branch 1:
# fewer steps against caching, uniform and non-uniform; one image per prompt.
#
#     bash scripts/table14_coco.sh --dry-run      commands, exact MACs, disk, what is missing
#     bash scripts/table14_coco.sh --images 100   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table14

coco() { row "$1" sd --prompts data/prompts/coco_captions_val2017.json --dtype fp16 "${@:2}"; }

# The paper:                                                                       img/s     x   CLIP
coco "PLMS 50 steps"                                                             # 0.237  1.00  30.24
coco "PLMS 45 steps"  --steps 45                                                 # 0.252  1.06  30.14
coco "PLMS 40 steps"  --steps 40                                                 # 0.306  1.29  30.19
coco "PLMS 35 steps"  --steps 35                                                 # 0.352  1.49  30.09
coco "PLMS 30 steps"  --steps 30                                                 # 0.384  1.62  30.04
coco "PLMS 25 steps"  --steps 25                                                 # 0.453  1.91  29.99
coco "PLMS 20 steps"  --steps 20                                                 # 0.526  2.22  29.82
coco "PLMS 15 steps"  --steps 15                                                 # 0.614  2.59  29.39
coco "Uniform N=2"    --interval 2                                               # 0.356  1.50  30.31
coco "Uniform N=3"    --interval 3                                               # 0.397  1.68  30.33
coco "Uniform N=4"    --interval 4                                               # 0.448  1.89  30.28
coco "Uniform N=5"    --interval 5                                               # 0.500  2.11  30.19
coco "Uniform N=6"    --interval 6                                               # 0.524  2.21  30.04
coco "Uniform N=7"    --interval 7                                               # 0.555  2.34  29.90
coco "Uniform N=8"    --interval 8                                               # 0.583  2.46  29.76
# Centre and power of Table 10:
coco "NonUniform N=2" --interval 2  --schedule centered --center 20  --power 1.3 # 0.356  1.50  30.37
coco "NonUniform N=3" --interval 3  --schedule centered --center 20  --power 1.4 # 0.397  1.68  30.34
coco "NonUniform N=4" --interval 4  --schedule centered --center 20  --power 1.4 # 0.448  1.89  30.31
coco "NonUniform N=5" --interval 5  --schedule centered --center 15  --power 1.3 # 0.500  2.11  30.23
coco "NonUniform N=6" --interval 6  --schedule centered --center 15  --power 1.5 # 0.524  2.21  30.18
coco "NonUniform N=7" --interval 7  --schedule centered --center 15  --power 1.5 # 0.555  2.34  30.10
coco "NonUniform N=8" --interval 8  --schedule centered --center 20  --power 1.3 # 0.583  2.46  30.02

run_table "$@"
