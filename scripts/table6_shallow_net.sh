#!/usr/bin/env bash
# DeepCache's Table 6: what the cached steps add to the full ones. DDPM on CIFAR-10: 100 DDIM steps of which 50, 20 or
# 10 are full, against so many plain DDIM steps.
#
#     bash scripts/table6_shallow_net.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table6_shallow_net.sh --images 1000   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table6 "$@"
