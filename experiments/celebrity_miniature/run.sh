#!/usr/bin/env bash
# All cells of the celebrity table on the miniature: five people x 3 seeds x (original, UCE, RECE, RealEra),
# and where the prompts lie (geometry.py).
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
cells train RECE logger=none method=rece
$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE"

for seed in $SEEDS; do # the closed forms alone
  for system in "RealEra method=realera method.align=null" "UCE method=uce method.edit.rows=suffix_2023"; do
    read -r label settings <<< "$system"
    # shellcheck disable=SC2086
    REALERA_STAMP="geometry-$label-$seed" $PY -m realera.train -m task=celebrity backbone=mini "concept=$CONCEPTS" "seed=$seed" \
      logger=none evaluate=false "root=$RUNS-geometry" "label=$label" $settings
  done
done
$PY "$HERE/geometry.py" "$RUNS-geometry"/*/
