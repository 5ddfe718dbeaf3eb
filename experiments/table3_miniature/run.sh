#!/usr/bin/env bash
# Table 3 on the miniature: RealEra with ever more of its parts, in the paper's order, x ten classes x three seeds. Its
# whole RealEra and the unedited model are cells of Table 1 as well: in the same RUNS they are done once. METHODS, CONCEPTS
# and SEEDS: see experiments/table.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
experiments/table.sh table3 table3_miniature table1_miniature realera-text
[[ -n ${METHODS:-} ]] || "${PYTHON:-.venv/bin/python}" experiments/table3_miniature/steps.py "runs/sweeps/${REALERA_STAMP:-table3-miniature}"
