#!/usr/bin/env bash
# Block Caching's Table 1: LDM-512, DPM-Solver and DDIM, guidance 5.0, bf16, with fewer steps and with caching. The
# paper's weights are not public: the rows run Stable Diffusion v1.5.
#
#     bash scripts/block_caching_table1.sh --dry-run      commands, exact MACs, disk, what is missing
#     bash scripts/block_caching_table1.sh --images 100   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table block_caching_table1

ldm512() { row "$1" sd --prompts data/prompts/coco_captions_val2017.json --guidance 5.0 --dtype bf16 "${@:2}"; }
cached() { later "$1" "needs a block schedule measured on the weights, which this script does not make yet"; }

# The paper:                                                                 img/s     x    FID
ldm512 "DPM 20 steps"                           --sampler dpmpp --steps 20 #  2.17  1.00  17.15
ldm512 "DPM 14 steps"                           --sampler dpmpp --steps 14 #  3.10  1.43  18.67
cached "DPM 20 steps, caching"                                             #  3.64  1.68  17.58
cached "DPM 20 steps, caching and scale-shift"                             #  3.59  1.65  15.95
ldm512 "DDIM 20 steps"                          --sampler ddim  --steps 20 #  2.17  1.00  17.43
ldm512 "DDIM 14 steps"                          --sampler ddim  --steps 14 #  3.10  1.43  17.11
cached "DDIM 20 steps, caching"                                            #  3.48  1.60  16.52
cached "DDIM 20 steps, caching and scale-shift"                            #  3.45  1.58  16.02
ldm512 "DPM 50 steps"                           --sampler dpmpp --steps 50 #  0.87  1.00  17.44
ldm512 "DPM 30 steps"                           --sampler dpmpp --steps 30 #  1.46  1.67  17.21
cached "DPM 50 steps, caching"                                             #  1.61  1.85  17.23
cached "DPM 50 steps, caching and scale-shift"                             #  1.59  1.82  15.18
ldm512 "DDIM 50 steps"                          --sampler ddim  --steps 50 #  0.87  1.00  17.76
ldm512 "DDIM 30 steps"                          --sampler ddim  --steps 30 #  1.46  1.67  17.42
cached "DDIM 50 steps, caching"                                            #  1.59  1.82  16.65
cached "DDIM 50 steps, caching and scale-shift"                            #  1.56  1.79  15.15

run_table "$@"
