#!/usr/bin/env bash
# Block Caching's Table 1: LDM-512, DPM-Solver and DDIM, guidance 5.0, bf16, with fewer steps and with caching. The
# paper's weights are not public: the rows run Stable Diffusion v1.5.
#
#     bash scripts/block_caching_table1.sh --dry-run      commands, exact MACs, disk, what is missing
#     bash scripts/block_schedules.sh                     measures the schedules and trains scale-shift: needs weights
#     bash scripts/block_caching_table1.sh --images 100   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table block_caching_table1

ldm512() {      # LABEL SAMPLER STEPS OPTIONS
    row "$1" sd --prompts data/prompts/coco_captions_val2017.json --guidance 5.0 --dtype bf16 \
        --sampler "$2" --steps "$3" "${@:4}"
}
made() { echo "checkpoints/block_caching/sd_v15_$2_$3"; }       # by scripts/block_schedules.sh
cached() {
    if [ -f "$(made "$@").safetensors" ]; then ldm512 "$@" --block-schedule "$(made "$@").json"
    else later "$1" "its schedule is not there yet: bash scripts/block_schedules.sh"; fi
}
tuned() {
    if [ -f "$(made "$@").safetensors" ]; then
        ldm512 "$@" --block-schedule "$(made "$@").json" --scale-shift "$(made "$@").safetensors"
    else later "$1" "its schedule is not there yet: bash scripts/block_schedules.sh"; fi
}
# Of ours, and needs no measurement: every transformer on the rhythm that the paper gives for one of them.
rhythm() { ldm512 "$@" --block-schedule "configs/block_schedules/sd_v15_$2_$3_rhythm.json"; }

# The paper:                                                      img/s     x    FID
ldm512 "DPM 20 steps" dpmpp 20                                 #  2.17  1.00  17.15
ldm512 "DPM 14 steps" dpmpp 14                                 #  3.10  1.43  18.67
cached "DPM 20 steps, caching" dpmpp 20                        #  3.64  1.68  17.58
rhythm "DPM 20 steps, caching / the example's rhythm" dpmpp 20 #  3.64  1.68  17.58
tuned "DPM 20 steps, caching and scale-shift" dpmpp 20        #  3.59  1.65  15.95
ldm512 "DDIM 20 steps" ddim 20                                 #  2.17  1.00  17.43
ldm512 "DDIM 14 steps" ddim 14                                 #  3.10  1.43  17.11
cached "DDIM 20 steps, caching" ddim 20                        #  3.48  1.60  16.52
rhythm "DDIM 20 steps, caching / the example's rhythm" ddim 20 #  3.48  1.60  16.52
tuned "DDIM 20 steps, caching and scale-shift" ddim 20        #  3.45  1.58  16.02
ldm512 "DPM 50 steps" dpmpp 50                                 #  0.87  1.00  17.44
ldm512 "DPM 30 steps" dpmpp 30                                 #  1.46  1.67  17.21
cached "DPM 50 steps, caching" dpmpp 50                        #  1.61  1.85  17.23
rhythm "DPM 50 steps, caching / the example's rhythm" dpmpp 50 #  1.61  1.85  17.23
tuned "DPM 50 steps, caching and scale-shift" dpmpp 50        #  1.59  1.82  15.18
ldm512 "DDIM 50 steps" ddim 50                                 #  0.87  1.00  17.76
ldm512 "DDIM 30 steps" ddim 30                                 #  1.46  1.67  17.42
cached "DDIM 50 steps, caching" ddim 50                        #  1.59  1.82  16.65
rhythm "DDIM 50 steps, caching / the example's rhythm" ddim 50 #  1.59  1.82  16.65
tuned "DDIM 50 steps, caching and scale-shift" ddim 50        #  1.56  1.79  15.15

run_table "$@"
