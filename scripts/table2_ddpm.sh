#!/usr/bin/env bash
# DeepCache's Table 2: DDPM on CIFAR-10, LSUN bedroom and LSUN church, 100 DDIM steps, eta 0, branch 2, 50,000 images
# a row.
#
#     bash scripts/table2_ddpm.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table2_ddpm.sh --images 1000   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table2

section cifar10
# The paper:                                                                     MACs  img/s     x   FID
row "DDPM* (reproduced)" ddpm --config configs/ddpm_cifar10.yaml               #  6.1   9.79  1.00  4.16
row "N=2"                ddpm --config configs/ddpm_cifar10.yaml --interval 2  # 4.15  13.73  1.40  4.35
row "N=3"                ddpm --config configs/ddpm_cifar10.yaml --interval 3  # 3.54  15.74  1.61  4.70
row "N=5"                ddpm --config configs/ddpm_cifar10.yaml --interval 5  # 3.01  18.11  1.85  5.73
row "N=10"               ddpm --config configs/ddpm_cifar10.yaml --interval 10 # 2.63  20.26  2.07  9.74

section bedroom
# The paper:                                                                     MACs  img/s     x   FID
row "DDPM* (reproduced)" ddpm --config configs/ddpm_bedroom.yaml              # 248.7   0.21  1.00  6.70
row "N=2"                ddpm --config configs/ddpm_bedroom.yaml --interval 2 # 190.8   0.27  1.29  6.69
row "N=3"                ddpm --config configs/ddpm_bedroom.yaml --interval 3 # 172.3   0.30  1.43  7.20
row "N=5"                ddpm --config configs/ddpm_bedroom.yaml --interval 5 # 156.0   0.31  1.48  9.49

section church
# The paper:                                                                    MACs  img/s     x    FID
row "DDPM* (reproduced)" ddpm --config configs/ddpm_church.yaml              # 248.7   0.21  1.00  10.87
row "N=2"                ddpm --config configs/ddpm_church.yaml --interval 2 # 190.8   0.27  1.29  11.31
row "N=3"                ddpm --config configs/ddpm_church.yaml --interval 3 # 172.3   0.30  1.43  11.75
row "N=5"                ddpm --config configs/ddpm_church.yaml --interval 5 # 156.0   0.31  1.48  13.68

run_table "$@"
