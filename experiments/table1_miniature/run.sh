#!/usr/bin/env bash
# Table 1 on the miniature: every system x ten classes x three seeds. METHODS, CONCEPTS and SEEDS: see experiments/table.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
experiments/table.sh table1 table1_miniature table1_miniature realera
