#!/usr/bin/env bash
# All cells of the style table on the miniature: five artists x 3 seeds x (original, UCE, RECE, RealEra).
# A cell that is finished is not redone. SEEDS="0" makes a third of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/style_miniature
SEEDS=${SEEDS:-0 1 2}
RUNS=${RUNS:-runs/style_miniature}
CONCEPTS=${CONCEPTS:-Van Gogh,Claude Monet,Pablo Picasso,Greg Rutkowski,Salvador Dali}
IMAGES=(task.images.erase=20 task.images.near=15 task.images.keep=5 task.images.associated=10 task.images.unseen=5)

cells() { # command, label, settings...
  for seed in $SEEDS; do
    REALERA_STAMP="style-$2-$seed" $PY -m "realera.$1" -m task=style backbone=mini "concept=$CONCEPTS" "seed=$seed" \
      "task.first_seed=$((1000 * seed))" "root=$RUNS" "${IMAGES[@]}" "label=$2" "${@:3}"
  done
}

cells evaluate original run=original logger=none
cells train RealEra logger=none
cells train UCE logger=none method=uce method.edit.rows=suffix_2023
cells train RECE logger=none method=rece
$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE"
