#!/usr/bin/env bash
# DeepCache's Table 9: centre and power of LDM-4-G's non-uniform schedules. Settings: this prints the full steps that
# they give and their MACs; scripts/table11_uniform_nonuniform.sh samples them.
#
#     bash scripts/table9_ldm_schedules.sh
exec bash "$(dirname "$0")/table.sh" table9 "$@"
