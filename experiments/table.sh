#!/usr/bin/env bash
# A table on the miniature: table.sh EXPERIMENT FOLDER RUNS BASE [SETTING...], called by each folder's run.sh. It continues
# where it was stopped; a finished cell is not repeated. METHODS="mace,ac", CONCEPTS="cat,dog" and SEEDS=0 run a part, so that
# several parts can run side by side with one thread each. BACKBONE=mini-dit takes the transformer. Differences are from BASE, if
# METHODS has it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PYTHON:-.venv/bin/python}
experiment=$1 folder=$2 runs=${RUNS:-runs/$3} base=(base="$4") settings=("${@:5}")
export REALERA_STAMP=${REALERA_STAMP:-${folder//[_\/]/-}} # the page shows this sweep's cells only, because tables may share their runs
part=("${settings[@]}")
if [[ -n ${METHODS:-} ]]; then
  part+=("hydra.sweeper.params.method='$METHODS'")
  [[ ",$METHODS," == *",$4,"* ]] || base=()
fi
[[ -z ${CONCEPTS:-} ]] || part+=("hydra.sweeper.params.concept='$CONCEPTS'")
[[ -z ${SEEDS:-} ]] || part+=("hydra.sweeper.params.seed='$SEEDS'")

$PY -m realera.train -m "experiment=$experiment" "backbone=${BACKBONE:-mini}" logger=none "root=$runs" "${part[@]}"
$PY -m realera.report "runs/sweeps/$REALERA_STAMP" "results=experiments/$folder" "${base[@]}"
