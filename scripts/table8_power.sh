#!/usr/bin/env bash
# DeepCache's Table 8: the power of the non-uniform schedule, LDM-4-G on ImageNet 256, N = 20, centre 120.
#
#     bash scripts/table8_power.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table8_power.sh --images 1000   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table8 "$@"
