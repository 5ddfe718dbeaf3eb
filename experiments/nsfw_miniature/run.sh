#!/usr/bin/env bash
# Table 2 on the miniature: its five stand-ins for unsafe content erased together, every system x three seeds. It
# resumes; METHODS="mace,ac" and SEEDS=0 run a part, so that several can run side by side with one thread each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/nsfw_miniature
RUNS=${RUNS:-runs/nsfw_miniature}
export REALERA_STAMP=${REALERA_STAMP:-table2-miniature}
part=()
[[ -z ${METHODS:-} ]] || part+=("hydra.sweeper.params.method='$METHODS'")
[[ -z ${SEEDS:-} ]] || part+=("hydra.sweeper.params.seed='$SEEDS'")

base=(base=realera) # differences are from it, where it is among the systems
[[ -z ${METHODS:-} ]] || base=()
$PY -m realera.train -m experiment=table2 backbone=mini logger=none "root=$RUNS" "${part[@]}"
$PY -m realera.report "runs/sweeps/$REALERA_STAMP" "results=$HERE" "${base[@]}"
