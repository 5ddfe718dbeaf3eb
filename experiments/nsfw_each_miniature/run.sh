#!/usr/bin/env bash
# Unsafe things one at a time on the miniature: every system x its five stand-ins x three seeds. It resumes; a finished
# cell is not redone. METHODS="mace,ac", CONCEPTS="gun" and SEEDS=0 run a part, so that several can run side by side with
# one thread each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/nsfw_each_miniature
RUNS=${RUNS:-runs/nsfw_each_miniature}
export REALERA_STAMP=${REALERA_STAMP:-table2-each-miniature}
part=()
[[ -z ${METHODS:-} ]] || part+=("hydra.sweeper.params.method='$METHODS'")
[[ -z ${CONCEPTS:-} ]] || part+=("hydra.sweeper.params.concept='$CONCEPTS'")
[[ -z ${SEEDS:-} ]] || part+=("hydra.sweeper.params.seed='$SEEDS'")

base=(base=realera) # differences are from it, where it is among the systems
[[ -z ${METHODS:-} ]] || base=()
$PY -m realera.train -m experiment=table2_each backbone=mini logger=none "root=$RUNS" "${part[@]}"
$PY -m realera.report "runs/sweeps/$REALERA_STAMP" "results=$HERE" "${base[@]}"
