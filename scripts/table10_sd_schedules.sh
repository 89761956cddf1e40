#!/usr/bin/env bash
# DeepCache's Table 10: centre and power of Stable Diffusion's non-uniform schedules. Settings: this prints the full
# steps that they give and their MACs; scripts/table13_parti.sh and table14_coco.sh sample them.
#
#     bash scripts/table10_sd_schedules.sh
exec bash "$(dirname "$0")/table.sh" table10 "$@"
