#!/usr/bin/env bash
# DeepCache's Table 2: DDPM on CIFAR-10, LSUN bedroom and LSUN church, 100 DDIM steps, eta 0, branch 2, 50,000 images
# a row.
#
#     bash scripts/table2_ddpm.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table2_ddpm.sh --images 1000   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table2 "$@"
