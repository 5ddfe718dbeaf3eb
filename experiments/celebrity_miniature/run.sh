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

for seed in $SEEDS; do
  SETTINGS=(task=celebrity backbone=mini "concept=$CONCEPTS" "seed=$seed" "task.first_seed=$((1000 * seed))" "root=$RUNS" "${IMAGES[@]}")
  REALERA_STAMP="celebrity-original-$seed" $PY -m realera.evaluate -m run=original "${SETTINGS[@]}" label=original
  REALERA_STAMP="celebrity-uce-$seed" $PY -m realera.train -m logger=none "${SETTINGS[@]}" method=uce \
    method.edit.rows=suffix_2023 label=UCE
  REALERA_STAMP="celebrity-realera-$seed" $PY -m realera.train -m logger=none "${SETTINGS[@]}" label=RealEra
done
$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE"
