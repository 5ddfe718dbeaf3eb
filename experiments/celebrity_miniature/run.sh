#!/usr/bin/env bash
# The table of people on the miniature: every system x five people x three seeds, and where the prompts lie (geometry.py).
# METHODS, CONCEPTS and SEEDS: see experiments/table.sh; a part leaves the geometry out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=experiments/celebrity_miniature
experiments/table.sh celebrity celebrity_miniature celebrity_miniature realera
[[ -z "${METHODS:-}${CONCEPTS:-}${SEEDS:-}" ]] || exit 0

GEOMETRY=${RUNS:-runs/celebrity_miniature}-geometry # the closed forms alone
REALERA_STAMP=celebrity-geometry ${PYTHON:-.venv/bin/python} -m realera.train -m experiment=celebrity backbone=mini logger=none \
  evaluate=false method.align=null "hydra.sweeper.params.method='realera-text,realera,uce'" "root=$GEOMETRY"
${PYTHON:-.venv/bin/python} "$HERE/geometry.py" "$GEOMETRY"/*/
