#!/usr/bin/env bash
# A table on the miniature: table.sh EXPERIMENT FOLDER RUNS BASE, as each folder's run.sh calls it. It resumes; a
# finished cell is not redone. METHODS="mace,ac", CONCEPTS="cat,dog" and SEEDS=0 run a part, so that several can run side
# by side with one thread each. Differences are from BASE, but for a part that METHODS names, which may lack it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PYTHON:-.venv/bin/python}
experiment=$1 folder=$2 runs=${RUNS:-runs/$3} base=(base="$4")
export REALERA_STAMP=${REALERA_STAMP:-${folder//_/-}} # the page is of this sweep's cells: tables may share their runs
part=()
if [[ -n ${METHODS:-} ]]; then
  part+=("hydra.sweeper.params.method='$METHODS'")
  base=()
fi
[[ -z ${CONCEPTS:-} ]] || part+=("hydra.sweeper.params.concept='$CONCEPTS'")
[[ -z ${SEEDS:-} ]] || part+=("hydra.sweeper.params.seed='$SEEDS'")

$PY -m realera.train -m "experiment=$experiment" backbone=mini logger=none "root=$runs" "${part[@]}"
$PY -m realera.report "runs/sweeps/$REALERA_STAMP" "results=experiments/$folder" "${base[@]}"
