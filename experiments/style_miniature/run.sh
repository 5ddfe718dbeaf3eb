#!/usr/bin/env bash
# The table of styles on the miniature: every system x five artists x three seeds. METHODS, CONCEPTS and SEEDS: see
# experiments/table.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
experiments/table.sh style style_miniature style_miniature realera
