#!/usr/bin/env bash
# DeepCache's Table 5: what is left when the cached feature is replaced by zeros. DDPM on CIFAR-10 (100 DDIM steps,
# branch 2) and LDM-4-G on ImageNet 256 (250 DDIM steps, branch 0).
#
#     bash scripts/table5_zeroed_cache.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table5_zeroed_cache.sh --images 1000   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table5 "$@"
