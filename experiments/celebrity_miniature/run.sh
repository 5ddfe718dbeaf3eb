#!/usr/bin/env bash
# The table of people on the miniature: every system x five people x three seeds, and where the prompts lie (geometry.py).
# It resumes; a finished cell is not redone. METHODS="mace,ac", CONCEPTS="Tom Cruise" and SEEDS=0 run a part, so that
# several can run side by side with one thread each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/celebrity_miniature
RUNS=${RUNS:-runs/celebrity_miniature}
export REALERA_STAMP=${REALERA_STAMP:-celebrity-miniature}
part=()
[[ -z ${METHODS:-} ]] || part+=("hydra.sweeper.params.method='$METHODS'")
[[ -z ${CONCEPTS:-} ]] || part+=("hydra.sweeper.params.concept='$CONCEPTS'")
[[ -z ${SEEDS:-} ]] || part+=("hydra.sweeper.params.seed='$SEEDS'")

base=(base=realera) # differences are from it, where it is among the systems
[[ -z ${METHODS:-} ]] || base=()
$PY -m realera.train -m experiment=celebrity backbone=mini logger=none "root=$RUNS" "${part[@]}"
$PY -m realera.report "runs/sweeps/$REALERA_STAMP" "results=$HERE" "${base[@]}"
[[ -z "${METHODS:-}${CONCEPTS:-}${SEEDS:-}" ]] || exit 0

for method in realera-text realera uce; do # the closed forms alone
  REALERA_STAMP="geometry-$method" $PY -m realera.train -m experiment=celebrity backbone=mini logger=none evaluate=false \
    "method=$method" method.align=null "root=$RUNS-geometry"
done
$PY "$HERE/geometry.py" "$RUNS-geometry"/*/
