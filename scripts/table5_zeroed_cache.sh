#!/usr/bin/env bash
# DeepCache's Table 5: what is left when the cached feature is replaced by zeros. DDPM on CIFAR-10 (100 DDIM steps,
# branch 2) and LDM-4-G on ImageNet 256 (250 DDIM steps, branch 0).
#
#     bash scripts/table5_zeroed_cache.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table5_zeroed_cache.sh --images 1000   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table5

# The paper:                                                                                   FID
row "DDPM CIFAR-10 N=10"    ddpm --interval 10                                            #   9.74
row "DDPM CIFAR-10 N=10, zeroed cache" \
    ddpm --interval 10 --zero-cache                                                       # 192.98
row "LDM-4-G ImageNet N=20" ldm --interval 20 --schedule centered --center 80 --power 1.2 #   7.36
row "LDM-4-G ImageNet N=20, zeroed cache" \
    ldm --interval 20 --schedule centered --center 80 --power 1.2 --zero-cache            # 312.12

run_table "$@"
