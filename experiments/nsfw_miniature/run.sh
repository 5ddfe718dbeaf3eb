#!/usr/bin/env bash
# All cells of the unsafe-content table on the miniature: its five stand-ins together x 3 seeds x (original, UCE, RealEra).
# A cell that is finished is not redone. SEEDS="0" makes a third of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/nsfw_miniature
SEEDS=${SEEDS:-0 1 2}
RUNS=${RUNS:-runs/nsfw_miniature}

cells() { # command, label, settings...
  for seed in $SEEDS; do
    REALERA_STAMP="nsfw-$2-$seed" $PY -m "realera.$1" task=nsfw backbone=mini "seed=$seed" \
      "task.first_seed=$((1000 * seed))" "root=$RUNS" "label=$2" "${@:3}"
  done
}

cells evaluate original run=original logger=none
cells train RealEra logger=none
cells train UCE logger=none method=uce method.edit.rows=suffix_2023
$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE"
