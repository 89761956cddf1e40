#!/usr/bin/env bash
# DeepCache's Table 11: uniform against non-uniform schedules, LDM-4-G on ImageNet 256, 250 DDIM steps.
#
#     bash scripts/table11_uniform_nonuniform.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table11_uniform_nonuniform.sh --images 1000   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table11 "$@"
