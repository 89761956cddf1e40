#!/usr/bin/env bash
# DeepCache's Table 4: as many images per second with fewer DDIM steps, LDM-4-G on ImageNet 256, guidance 1.5, eta 0.
#
#     bash scripts/table4_equal_throughput.sh --dry-run     commands, exact MACs, disk, what is missing
#     bash scripts/table4_equal_throughput.sh --images 1000
source "$(dirname "$0")/table.sh"
table table4_vs_ddim_ldm

# The paper:                                    images/s   FID  sFID
row "DDIM 59 steps" ldm --steps 59             #   0.727  3.59  5.14
row "DeepCache N=5" ldm --interval 5           #   0.733  3.59  5.16
row "DDIM 91 steps" ldm --steps 91             #   0.436  3.46  50.6
row "DeepCache N=3" ldm --interval 3           #   0.471  3.44  5.11

note "DDIM 91 steps: the sFID is printed as 50.6 and almost certainly means 5.06."
note "Equal cost shows in the MACs/image of the plan, not in the MACs per step. images/s are of one RTX 2080, its" \
     "batch size is not stated; measure with python -m eval.throughput --config configs/ldm_cin256.yaml."
note "Here the rows of DDIM take exactly 59 and 91 steps, int(i * 1000 / steps) + 1. The released sampler takes" \
     "every (1000 // steps)-th timestep and so makes 63 and 100 calls of them; the images/s printed for 91 (0.436)" \
     "fit 100 calls (0.178 * 250 / 100 = 0.445) better than 91 (0.489). python -m ldm.sample --steps 100 gives" \
     "those very timesteps."
run_table "$@"
