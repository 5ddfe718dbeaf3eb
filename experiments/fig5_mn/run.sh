#!/usr/bin/env bash
# Figure 5 on the miniature: 5 x 5 settings x two classes x three seeds, the closed form. It continues where it was stopped.
# SEEDS=0 runs a third, so that several parts can run side by side with one thread each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/fig5_mn
RUNS=${RUNS:-runs/fig5_mn}

REALERA_STAMP=fig5-mn-${SEEDS:-all} $PY -m realera.train -m experiment=fig5_mn backbone=mini logger=none "root=$RUNS" \
  "hydra.sweeper.params.seed='${SEEDS:-0,1,2}'"
$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE"
