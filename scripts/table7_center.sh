#!/usr/bin/env bash
# DeepCache's Table 7: the centre of the non-uniform schedule, LDM-4-G on ImageNet 256, N = 20, power 1.2.
#
#     bash scripts/table7_center.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table7_center.sh --images 1000   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table7 "$@"
