#!/usr/bin/env bash
# DeepCache's Table 11: uniform against non-uniform schedules, LDM-4-G on ImageNet 256, 250 DDIM steps.
#
#     bash scripts/table11_uniform_nonuniform.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table11_uniform_nonuniform.sh --images 1000   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table11

ldm_centered() { row "$1" ldm --interval "$2" --schedule centered --center "$3" --power "$4"; }

# The paper:                                        FID  sFID      IS  prec.  recall
row "Uniform N=2"              ldm --interval 2  # 3.39  5.11  204.09  82.75   54.07
row "Uniform N=3"              ldm --interval 3  # 3.44  5.11  202.79  82.65   53.81
row "Uniform N=5"              ldm --interval 5  # 3.59  5.16  200.45  82.36   53.31
row "Uniform N=10"             ldm --interval 10 # 4.41  5.57  191.11  81.26   51.53
row "Uniform N=20"             ldm --interval 20 # 8.23  8.08  161.83  75.31   50.57
# Centre and power of Table 9:
ldm_centered "NonUniform N=2"  2 120 1.2         # 3.46  5.14  204.12  83.21   53.53
ldm_centered "NonUniform N=3"  3 120 1.2         # 3.49  5.13  203.22  83.18   53.44
ldm_centered "NonUniform N=5"  5 110 1.4         # 3.63  5.12  200.04  83.07   53.25
ldm_centered "NonUniform N=10" 10 110 1.2        # 4.27  5.42  193.11  81.75   51.84
ldm_centered "NonUniform N=20" 20 120 1.4        # 7.36  7.76  166.21  76.93   49.75
# The setting that Table 7 prints these very numbers for:
ldm_centered "NonUniform N=20 / centre 80, power 1.2" \
    20 80 1.2                                    # 7.36  7.76  166.21  76.93   49.75

run_table "$@"
