#!/usr/bin/env bash
# Builds the folder once (4.3 GB, ignored by git), then measures, with OMP_NUM_THREADS threads (default 1).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/full_size
FOLDER=${FOLDER:-runs/full_size/sd14}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ -f "$FOLDER/model_index.json" ] || $PY $HERE/folder.py "$FOLDER"
$PY $HERE/measure.py "$FOLDER" $HERE/results.json backbone.gradient_checkpointing=true "$@"
