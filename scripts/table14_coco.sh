#!/usr/bin/env bash
# DeepCache's Table 14: Stable Diffusion v1.5 on COCO 2017's captions, PLMS, guidance 7.5, fp16, branch 1:
# fewer steps against caching, uniform and non-uniform; one image per prompt.
#
#     bash scripts/table14_coco.sh --dry-run      commands, exact MACs, disk, what is missing
#     bash scripts/table14_coco.sh --images 100   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table14 "$@"
