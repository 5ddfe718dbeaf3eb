#!/usr/bin/env bash
# Unsafe things one at a time on the miniature: every system x its five stand-ins x three seeds. METHODS, CONCEPTS and
# SEEDS: see experiments/table.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
experiments/table.sh table2_each nsfw_each_miniature nsfw_each_miniature realera
