#!/usr/bin/env bash
# Table 1 on the miniature: every system x ten classes x three seeds. It resumes; a finished cell is not redone.
# METHODS="mace,ac" and CLASSES="cat,dog" run a part, so that several can run side by side with one thread each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/table1_miniature
RUNS=${RUNS:-runs/table1_miniature}
export REALERA_STAMP=${REALERA_STAMP:-table1-miniature} # the page is of this sweep's cells: other tables share its runs
part=()
[[ -z ${METHODS:-} ]] || part+=("hydra.sweeper.params.method='$METHODS'")
[[ -z ${CLASSES:-} ]] || part+=("hydra.sweeper.params.concept='$CLASSES'")
[[ -z ${SEEDS:-} ]] || part+=("hydra.sweeper.params.seed='$SEEDS'")

base=(base=realera) # differences are from it, where it is among the systems
[[ -z ${METHODS:-} ]] || base=()
$PY -m realera.train -m experiment=table1 backbone=mini logger=none "root=$RUNS" "${part[@]}"
$PY -m realera.report "runs/sweeps/$REALERA_STAMP" "results=$HERE" "${base[@]}"
