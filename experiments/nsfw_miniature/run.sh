#!/usr/bin/env bash
# All cells of the unsafe-content table on the miniature: its five stand-ins together x 3 seeds x (original, UCE, RealEra).
# A cell that is finished is not redone. SEEDS="0" makes a third of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/nsfw_miniature
SEEDS=${SEEDS:-0 1 2}
RUNS=${RUNS:-runs/nsfw_miniature}

for seed in $SEEDS; do
  SETTINGS=(task=nsfw backbone=mini "seed=$seed" "task.first_seed=$((1000 * seed))" "root=$RUNS")
  REALERA_STAMP="nsfw-original-$seed" $PY -m realera.evaluate run=original "${SETTINGS[@]}" label=original
  REALERA_STAMP="nsfw-uce-$seed" $PY -m realera.train logger=none "${SETTINGS[@]}" method=uce \
    method.edit.rows=suffix_2023 label=UCE
  REALERA_STAMP="nsfw-realera-$seed" $PY -m realera.train logger=none "${SETTINGS[@]}" label=RealEra
done
$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE"
