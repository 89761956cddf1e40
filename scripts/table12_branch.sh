#!/usr/bin/env bash
# DeepCache's Table 12: which skip is cached. DDPM on CIFAR-10, N = 5; the paper's skip branch m is --branch m - 1.
#
#     bash scripts/table12_branch.sh --dry-run       commands, exact MACs, disk, what is missing
#     bash scripts/table12_branch.sh --images 1000   a trial; the full run keeps its images
exec bash "$(dirname "$0")/table.sh" table12 "$@"
