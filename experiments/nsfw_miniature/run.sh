#!/usr/bin/env bash
# Table 2 on the miniature: its five stand-ins for unsafe content erased together, every system x three seeds. METHODS
# and SEEDS: see experiments/table.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
experiments/table.sh table2 nsfw_miniature nsfw_miniature realera
