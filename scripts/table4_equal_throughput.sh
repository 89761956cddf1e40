#!/usr/bin/env bash
# DeepCache's Table 4: as many images per second with fewer DDIM steps, LDM-4-G on ImageNet 256, guidance 1.5, eta 0.
#
#     bash scripts/table4_equal_throughput.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table4_equal_throughput.sh --images 1000   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table4 "$@"
