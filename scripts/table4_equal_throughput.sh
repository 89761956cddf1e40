#!/usr/bin/env bash
# DeepCache's Table 4: as many images per second with fewer DDIM steps, LDM-4-G on ImageNet 256, guidance 1.5, eta 0.
#
#     bash scripts/table4_equal_throughput.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table4_equal_throughput.sh --images 1000   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table4

# The paper:                           img/s   FID   sFID
row "DDIM 59 steps" ldm --steps 59   # 0.727  3.59   5.14
row "DeepCache N=5" ldm --interval 5 # 0.733  3.59   5.16
row "DDIM 91 steps" ldm --steps 91   # 0.436  3.46  50.60
row "DeepCache N=3" ldm --interval 3 # 0.471  3.44   5.11

run_table "$@"
