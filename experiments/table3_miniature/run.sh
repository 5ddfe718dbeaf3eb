#!/usr/bin/env bash
# Table 3 on the miniature: RealEra with ever more of its parts, in the paper's order, x ten classes x three seeds. Its
# whole RealEra and the unedited model are cells of Table 1 as well: in the same RUNS they are done once. It resumes;
# METHODS="realera-no-beyond" and SEEDS=0 run a part, so that several can run side by side with one thread each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/table3_miniature
RUNS=${RUNS:-runs/table1_miniature}
export REALERA_STAMP=${REALERA_STAMP:-table3-miniature}
part=()
[[ -z ${METHODS:-} ]] || part+=("hydra.sweeper.params.method='$METHODS'")
[[ -z ${SEEDS:-} ]] || part+=("hydra.sweeper.params.seed='$SEEDS'")

base=(base=realera-text) # differences are from it, where it is among the systems
[[ -z ${METHODS:-} ]] || base=()
$PY -m realera.train -m experiment=table3 backbone=mini logger=none "root=$RUNS" "${part[@]}"
$PY -m realera.report "runs/sweeps/$REALERA_STAMP" "results=$HERE" "${base[@]}"
