#!/usr/bin/env bash
# Ratios of speed on this machine's CPU: the closed form against a loop written like UCE's official code (full size,
# random weights), an alignment step against the bare passes of the same networks, and drawing against diffusers'
# pipeline (both on the miniature). The two sides of each pair alternate in one process. The numbers are written to RESULTS.
# COUNTS=1,100,1000 also erases a thousand names, which takes the loop minutes. MEMORY=1000 also erases a thousand concepts
# with RealEra's closed form, with mining, and measures the peak memory: about an hour on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
FOLDER=${FOLDER:-runs/bench/sd14}
RESULTS=${RESULTS:-runs/bench/results.json}
mkdir -p "$(dirname "$FOLDER")" "$(dirname "$RESULTS")"
export WANDB_MODE=offline

if [[ ! -f $FOLDER/model_index.json ]]; then
  echo "making a Stable Diffusion 1.4 with random weights in $FOLDER: 4.3 GB"
  "$PY" experiments/full_size/folder.py "$FOLDER" sd14 float32 cpu > "$(dirname "$RESULTS")/folder.log" 2>&1
fi
"$PY" experiments/bench/measure.py "$FOLDER" "$RESULTS" "${COUNTS:-1,100}"
"$PY" experiments/cuda/measure.py sd14-float32 "$RESULTS" cpu > "$(dirname "$RESULTS")/miniature.log" 2>&1
"$PY" experiments/bench/valera.py "$FOLDER" "$RESULTS"
[[ -z ${MEMORY:-} ]] || "$PY" experiments/bench/memory.py "$FOLDER" "$RESULTS" "$MEMORY"
"$PY" experiments/bench/table.py "$RESULTS"
