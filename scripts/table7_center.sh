#!/usr/bin/env bash
# DeepCache's Table 7: the centre of the non-uniform schedule, LDM-4-G on ImageNet 256, N = 20, power 1.2.
#
#     bash scripts/table7_center.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table7_center.sh --images 1000   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table7

# The paper:                                                                       FID  sFID      IS  prec.  recall
row "centre 10"  ldm --interval 20 --schedule centered --center 10  --power 1.2 # 8.26  8.47  160.30  75.69   48.93
row "centre 20"  ldm --interval 20 --schedule centered --center 20  --power 1.2 # 8.17  8.46  161.18  75.77   48.95
row "centre 50"  ldm --interval 20 --schedule centered --center 50  --power 1.2 # 7.77  8.16  163.74  76.23   49.18
row "centre 80"  ldm --interval 20 --schedule centered --center 80  --power 1.2 # 7.36  7.76  166.21  76.93   49.75
row "centre 100" ldm --interval 20 --schedule centered --center 100 --power 1.2 # 7.16  7.51  167.52  77.30   49.64
row "centre 120" ldm --interval 20 --schedule centered --center 120 --power 1.2 # 7.11  7.34  167.85  77.44   50.08
row "centre 150" ldm --interval 20 --schedule centered --center 150 --power 1.2 # 7.33  7.36  166.04  77.09   49.98
row "centre 200" ldm --interval 20 --schedule centered --center 200 --power 1.2 # 8.09  7.79  160.50  75.85   49.69

run_table "$@"
