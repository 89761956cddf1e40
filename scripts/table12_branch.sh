#!/usr/bin/env bash
# DeepCache's Table 12: which skip is cached. DDPM on CIFAR-10, N = 5; the paper's skip branch m is --branch m - 1.
#
#     bash scripts/table12_branch.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table12_branch.sh --images 1000   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table12

# The paper:                                         MACs  img/s      x   FID
row "skip branch 1"  ddpm --interval 5 --branch 0  # 1.60  29.60  3.023  7.14
row "skip branch 2"  ddpm --interval 5 --branch 1  # 2.24  22.24  2.272  5.94
row "skip branch 3"  ddpm --interval 5 --branch 2  # 3.01  18.11  1.850  5.73
row "skip branch 4"  ddpm --interval 5 --branch 3  # 3.89  15.44  1.577  5.69
row "skip branch 5"  ddpm --interval 5 --branch 4  # 4.58  13.15  1.343  5.51
row "skip branch 6"  ddpm --interval 5 --branch 5  # 5.31  11.46  1.171  4.93
row "skip branch 7"  ddpm --interval 5 --branch 6  # 5.45  11.27  1.151  4.92
row "skip branch 8"  ddpm --interval 5 --branch 7  # 5.60  11.07  1.131  4.76
row "skip branch 9"  ddpm --interval 5 --branch 8  # 5.88  10.82  1.105  4.54
row "skip branch 10" ddpm --interval 5 --branch 9  # 5.95  10.73  1.096  4.57
row "skip branch 11" ddpm --interval 5 --branch 10 # 5.99  10.67  1.089  4.52
row "skip branch 12" ddpm --interval 5 --branch 11 # 6.03  10.59  1.082  4.48

run_table "$@"
