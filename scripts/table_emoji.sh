#!/usr/bin/env bash
# No paper's table: DeepCache on the small DDPM that is shipped. It needs no download; to try out a machine or a cluster.
#
#     bash scripts/table_emoji.sh                  about half an hour on one core
#     bash scripts/table_emoji.sh --images 80      a tenth of it
# The scores are on EfficientNet-Lite0 features: not FID, and comparable with each other only.
source "$(dirname "$0")/table.sh"
own_table emoji 512 "The shipped DDPM, emoji 32x32, 100 steps, branch 2"

emoji() { row "$1" ddpm --config configs/ddpm_emoji.yaml "${@:2}"; }

emoji "no cache"
emoji "N=2"              --interval 2
emoji "N=5"              --interval 5
emoji "N=10"             --interval 10
emoji "10 plain steps"   --steps 10

run_table "$@"
