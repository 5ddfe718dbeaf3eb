#!/usr/bin/env bash
# Figure 5 on the miniature: 5 x 5 settings x two classes x three seeds, the closed form. It continues where it was stopped.
# SEEDS=0 runs a third, so that several parts can run side by side with one thread each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/fig5_ds
RUNS=${RUNS:-runs/fig5_ds}

REALERA_STAMP=fig5-ds-${SEEDS:-all} $PY -m realera.train -m experiment=fig5_ds backbone=mini logger=none "root=$RUNS" \
  "hydra.sweeper.params.seed='${SEEDS:-0,1,2}'"
$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE"
