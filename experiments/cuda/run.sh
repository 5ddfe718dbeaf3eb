#!/usr/bin/env bash
# Tests and measurements on one CUDA device: experiments/cuda/run.sh [PART ...], from the top of the checkout.
#   PYTHON=python3     the interpreter; default .venv/bin/python
#   FOLDERS=DIR        where the folders with random weights are made (40 GB; default runs/cuda, ignored by git)
#   RESULTS=FILE       default experiments/cuda/results.json; LOGS=DIR for the parts' output, default $FOLDERS
#   REHEARSE=1         the same on the CPU, with the miniature instead of the full-size models
# Every part is a separate process with a time limit. Failed parts are listed at the end, and the exit status is then 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=experiments/cuda
PY=${PYTHON:-.venv/bin/python}
export FOLDERS=${FOLDERS:-runs/cuda} PYTHONUNBUFFERED=1 WANDB_MODE=offline HF_HUB_OFFLINE=1
export REALERA_CACHE=${REALERA_CACHE:-$FOLDERS/cache} PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
RESULTS=$(realpath -m "${RESULTS:-$HERE/results.json}")
LOGS=$(realpath -m "${LOGS:-$FOLDERS}")
mkdir -p "$FOLDERS" "$LOGS"
parts=("$@")
[ $# -gt 0 ] || parts=(environment tests sd14-bfloat16 sd14-float16 sd14-float32 sdxl options compile closed road attacks flux)
cpu=${REHEARSE:+cpu}
failed=()
flux_words="bfloat16 cuda"
[ -z "$cpu" ] || flux_words="bfloat16 cpu small"

folder() { # KIND DTYPE: made once
  [ -n "$cpu" ] || [ -f "$FOLDERS/$1/model_index.json" ] ||
    "$PY" experiments/full_size/folder.py "$FOLDERS/$1" "$1" "$2" cuda > "$LOGS/folder-$1.log" 2>&1
}

flux() { # with random weights: 25 GB
  [ -f "$FOLDERS/flux-dev/model_index.json" ] ||
    "$PY" experiments/full_size/flux.py "$FOLDERS/flux-dev" $flux_words > "$LOGS/folder-flux.log" 2>&1
}

tests() {
  : > "$LOGS/differences.jsonl"
  REALERA_CUDA_RECORD="$LOGS/differences.jsonl" REALERA_TEST_DEVICE=${cpu:-cuda} OMP_NUM_THREADS=${TEST_THREADS:-4} \
    timeout "${TEST_LIMIT:-240}" "$PY" -m pytest tests/cuda -q -n "${TEST_WORKERS:-4}" --dist load \
    -o addopts="--import-mode=importlib" -o cache_dir="$LOGS/.pytest" --junitxml="$LOGS/tests.xml" > "$LOGS/tests.log" 2>&1
  local status=$?
  tail -n 25 "$LOGS/tests.log"
  "$PY" "$HERE/differences.py" "$LOGS" "$RESULTS"
  return $status
}

[[ " ${parts[*]} " =~ \ (sd14-.*|options|compile|closed|road|attacks|profile)\  ]] && { folder sd14 float32 & }
for part in "${parts[@]}"; do
  echo "== $part ($SECONDS s)"
  if [ "$part" = tests ]; then
    tests || failed+=("$part")
    continue
  fi
  [ "$part" != sdxl ] || folder sdxl float16
  [ "$part" != flux ] || flux
  wait # for the folder
  timeout "${LIMIT:-240}" "$PY" "$HERE/measure.py" "$part" "$RESULTS" $cpu > "$LOGS/$part.log" 2>&1 || failed+=("$part")
  tail -n 3 "$LOGS/$part.log"
done
echo "== done ($SECONDS s)${failed:+, failed: ${failed[*]}}"
[ ${#failed[@]} -eq 0 ]
