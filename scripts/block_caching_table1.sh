#!/usr/bin/env bash
# Block Caching's Table 1: LDM-512, DPM-Solver and DDIM, guidance 5.0, bf16, with fewer steps and with caching. The
# paper's weights are not public: the rows run Stable Diffusion v1.5.
#
#     bash scripts/block_caching_table1.sh --dry-run      commands, exact MACs, disk, what is missing
#     bash scripts/block_schedules.sh                     measures the schedules and trains scale-shift: needs weights
#     bash scripts/block_caching_table1.sh --images 100   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" block_caching_table1 "$@"
