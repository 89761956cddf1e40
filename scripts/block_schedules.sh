#!/usr/bin/env bash
# Measures how much the blocks of Stable Diffusion v1.5 change, makes the schedules of Block Caching's Table 1 (delta 0.5,
# 32 prompts with 2 seeds, as the paper), and trains their scale and shift. What is there is kept.
#
#     bash scripts/block_schedules.sh                                 all four: DPM-Solver++ and DDIM, 20 and 50 steps
#     bash scripts/block_schedules.sh --device cuda --dtype bf16      options go to the measurement and the training
#
# Another model, or less of it: CONFIG, PROMPTS, SAMPLERS, STEPS, and MEASURED, TRAINED, HELD_OUT (numbers of images),
# as environment variables. Files: checkpoints/block_caching/MODEL_SAMPLER_STEPS.json and .safetensors
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

config=${CONFIG:-configs/sd_v15.yaml}
prompts=${PROMPTS:-data/prompts/coco_captions_val2017.json}
name=checkpoints/block_caching/$(basename "$config" .yaml)
measured=${MEASURED:-64} trained=${TRAINED:-64} held_out=${HELD_OUT:-32}
guidance=${GUIDANCE:-5.0}
first=$measured second=$((measured + trained))      # the three sets have no prompt in common, but for one at a border
mkdir -p checkpoints/block_caching

for sampler in ${SAMPLERS:-dpmpp ddim}; do
    for steps in ${STEPS:-20 50}; do
        made=${name}_${sampler}_$steps
        run=(--config "$config" --prompts "$prompts" --images-per-prompt 2 --guidance "$guidance" --sampler "$sampler"
             --steps "$steps" "$@")
        [ -f "${made}_changes.json" ] || "$PYTHON" -m lab.fit changes "${run[@]}" \
            --seeds "0-$((measured - 1))" --out "${made}_changes.json"
        [ -f "$made.json" ] || "$PYTHON" -m lab.fit block-schedule --changes "${made}_changes.json" \
            --kinds transformer --delta 0.5 --out "$made.json"
        [ -f "$made.safetensors" ] || "$PYTHON" -m lab.fit scale-shift "${run[@]}" --block-schedule "$made.json" \
            --method adam --seeds "$first-$((second - 1))" --held-out-seeds "$second-$((second + held_out - 1))" \
            --out "$made.safetensors"
    done
done
