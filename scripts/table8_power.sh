#!/usr/bin/env bash
# DeepCache's Table 8: the power of the non-uniform schedule, LDM-4-G on ImageNet 256, N = 20, centre 120.
#
#     bash scripts/table8_power.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table8_power.sh --images 1000   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table8

# The paper:                                                                        FID  sFID      IS  prec.  recall
row "power 1.05" ldm --interval 20 --schedule centered --center 120 --power 1.05 # 7.36  7.52  166.12  77.06   50.38
row "power 1.1"  ldm --interval 20 --schedule centered --center 120 --power 1.1  # 7.25  7.44  166.82  77.17   50.13
row "power 1.2"  ldm --interval 20 --schedule centered --center 120 --power 1.2  # 7.11  7.34  167.85  77.44   50.08
row "power 1.3"  ldm --interval 20 --schedule centered --center 120 --power 1.3  # 7.09  7.35  167.97  77.56   50.34
row "power 1.4"  ldm --interval 20 --schedule centered --center 120 --power 1.4  # 7.13  7.39  167.68  77.42   50.26
row "power 1.5"  ldm --interval 20 --schedule centered --center 120 --power 1.5  # 7.25  7.44  166.82  77.17   50.13

run_table "$@"
