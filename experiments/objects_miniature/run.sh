#!/usr/bin/env bash
# All cells of the object table on the miniature: 10 classes x 3 seeds x (original, UCE twice, RealEra in four steps).
# A cell that is finished is not redone, so the same command goes on after a stop. SEEDS="0" makes a third of it, and
# CLASSES="cat,dog" two classes, so that several can run side by side with one thread each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/objects_miniature
CLASSES=${CLASSES:-airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck}
SEEDS=${SEEDS:-0 1 2}
RUNS=${RUNS:-runs/objects_miniature}
# about a third of the task's own count, so that ten classes and three seeds fit: 112 images a cell
IMAGES=(task.images.erase=16 task.images.near=6 task.images.keep=6 task.images.associated=3 task.images.unseen=3)

cell() { # label, settings...
  local label=$1
  shift
  REALERA_STAMP="objects-$(tr -c 'a-z0-9\n' - <<<"${label,,}")-$seed" $PY -m realera.train -m task=object backbone=mini \
    logger=none "concept=$CLASSES" "seed=$seed" "task.first_seed=$((1000 * seed))" "label=$label" "root=$RUNS" \
    "${IMAGES[@]}" "$@"
}

for seed in $SEEDS; do
  REALERA_STAMP="objects-original-$seed" $PY -m realera.evaluate -m run=original task=object backbone=mini logger=none \
    "concept=$CLASSES" "seed=$seed" "task.first_seed=$((1000 * seed))" label=original "root=$RUNS" "${IMAGES[@]}"
  cell UCE method=uce method.edit.rows=suffix_2023
  cell "UCE one row" method=uce method.edit.rows=last
  cell "closed form alone" method.neighbours=null method.align=null
  cell "+ mining" method.neighbours.n=0 method.align=null
  cell "+ beyond-concept" method.align=null
  cell "RealEra" method=realera
done
$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE"
