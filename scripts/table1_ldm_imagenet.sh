#!/usr/bin/env bash
# DeepCache's Table 1: LDM-4-G on ImageNet 256, 250 DDIM steps, eta 0, guidance 1.5, branch 0, 50,000 images a row.
#
#     bash scripts/table1_ldm_imagenet.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table1_ldm_imagenet.sh --images 1000   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table1 "$@"
