#!/usr/bin/env bash
# All cells of the celebrity table on the miniature: five people x 3 seeds x (original, UCE, RealEra).
# A cell that is finished is not redone. SEEDS="0" makes a third of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/celebrity_miniature
SEEDS=${SEEDS:-0 1 2}
RUNS=${RUNS:-runs/celebrity_miniature}
CONCEPTS=${CONCEPTS:-Tom Cruise,Elon Musk,Jennifer Lawrence,Mariah Carey,Leonardo DiCaprio}
IMAGES=(task.images.erase=20 task.images.near=15 task.images.keep=3 task.images.associated=5 task.images.unseen=5)

cells() { # command, label, settings...
  for seed in $SEEDS; do
    REALERA_STAMP="celebrity-$2-$seed" $PY -m "realera.$1" -m task=celebrity backbone=mini "concept=$CONCEPTS" "seed=$seed" \
      "task.first_seed=$((1000 * seed))" "root=$RUNS" "${IMAGES[@]}" "label=$2" "${@:3}"
  done
}

cells evaluate original run=original logger=none
cells train RealEra logger=none
cells train UCE logger=none method=uce method.edit.rows=suffix_2023
$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE"
