#!/usr/bin/env bash
# DeepCache's Table 3: Stable Diffusion v1.5 on PartiPrompts and COCO 2017's captions, PLMS, guidance 7.5, fp16,
# branch 1; one image per prompt.
#
#     bash scripts/table3_sd.sh --dry-run      commands, exact MACs, disk, what is missing
#     bash scripts/table3_sd.sh --images 100   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table3

parti() { row "$1" sd --prompts data/prompts/parti.tsv --dtype fp16 "${@:2}"; }
section parti
# The paper:                                                                                   MACs  img/s     x   CLIP
parti "PLMS 50 steps"                                                                      # 338.83  0.230  1.00  29.51
parti "PLMS 25 steps"           --steps 25                                                 # 169.42  0.470  2.04  29.33
parti "BK-SDM Base"             --model checkpoints/bk-sdm-base-2m --diffusers-unet        # 223.81  0.343  1.49  28.88
parti "BK-SDM Small"            --model checkpoints/bk-sdm-small-2m --diffusers-unet       # 217.78  0.402  1.75  27.94
parti "BK-SDM Tiny"             --model checkpoints/bk-sdm-tiny-2m --diffusers-unet        # 205.09  0.416  1.81  27.36
parti "DeepCache N=5"           --interval 5  --schedule centered --center 10  --power 1.5 # 130.45  0.494  2.15  29.46
parti "DeepCache N=5 / uniform" --interval 5                                               # 130.45  0.494  2.15  29.46

coco() { row "$1" sd --prompts data/prompts/coco_captions_val2017.json --dtype fp16 "${@:2}"; }
section coco
# The paper:                                                                                  MACs  img/s     x   CLIP
coco "PLMS 50 steps"                                                                      # 338.83  0.237  1.00  30.30
coco "PLMS 25 steps"           --steps 25                                                 # 169.42  0.453  1.91  29.99
coco "BK-SDM Base"             --model checkpoints/bk-sdm-base-2m --diffusers-unet        # 223.81  0.344  1.45  29.47
coco "BK-SDM Small"            --model checkpoints/bk-sdm-small-2m --diffusers-unet       # 217.78  0.397  1.68  27.96
coco "BK-SDM Tiny"             --model checkpoints/bk-sdm-tiny-2m --diffusers-unet        # 205.09  0.415  1.76  27.41
coco "DeepCache N=5"           --interval 5  --schedule centered --center 15  --power 1.3 # 130.45  0.500  2.11  30.23
coco "DeepCache N=5 / uniform" --interval 5                                               # 130.45  0.500  2.11  30.23

run_table "$@"
