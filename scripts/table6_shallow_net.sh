#!/usr/bin/env bash
# DeepCache's Table 6: what the cached steps add to the full ones. DDPM on CIFAR-10: 100 DDIM steps of which 50, 20 or
# 10 are full, against so many plain DDIM steps.
#
#     bash scripts/table6_shallow_net.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table6_shallow_net.sh --images 1000   a trial; the full run keeps its images
source "$(dirname "$0")/table.sh"
table table6

# The paper:                                FID
row "DDIM 50 steps"  ddpm --steps 50    #  4.67
row "DeepCache N=2"  ddpm --interval 2  #  4.35
row "DDIM 20 steps"  ddpm --steps 20    #  6.84
row "DeepCache N=5"  ddpm --interval 5  #  5.73
row "DDIM 10 steps"  ddpm --steps 10    # 13.36
row "DeepCache N=10" ddpm --interval 10 # 10.38

run_table "$@"
