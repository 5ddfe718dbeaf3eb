#!/usr/bin/env bash
# Builds the folder once (4.3 GB, not kept in git), then measures; one thread unless OMP_NUM_THREADS says otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/full_size
FOLDER=${FOLDER:-runs/full_size/sd14}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ -f "$FOLDER/model_index.json" ] || $PY $HERE/folder.py "$FOLDER"
$PY $HERE/measure.py "$FOLDER" $HERE/results.json backbone.gradient_checkpointing=true "$@"
