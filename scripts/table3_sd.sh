#!/usr/bin/env bash
# DeepCache's Table 3: Stable Diffusion v1.5 on PartiPrompts and COCO 2017's captions, PLMS, guidance 7.5, fp16,
# branch 1; one image per prompt.
#
#     bash scripts/table3_sd.sh --dry-run      commands, exact MACs, disk, what is missing
#     bash scripts/table3_sd.sh --images 100   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table3 "$@"
