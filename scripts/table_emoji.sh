#!/usr/bin/env bash
# No paper's table: DeepCache on the small DDPM that is shipped. It needs no download; to try out a machine or a cluster.
#
#     bash scripts/table_emoji.sh                  about half an hour on one core
#     bash scripts/table_emoji.sh --images 80      a tenth of it
# The scores are on EfficientNet-Lite0 features: not FID, and comparable with each other only.
exec bash "$(dirname "$0")/table.sh" emoji "$@"
