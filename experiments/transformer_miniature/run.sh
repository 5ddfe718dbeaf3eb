#!/usr/bin/env bash
# The transformer miniature beside the U-Net: ten classes and five people, two seeds, every system that a transformer can have; and
# where a concept lies in its text states, keys, values and predictions. SEARCH=1 first searches the methods' settings on other
# concepts. METHODS, CONCEPTS and SEEDS: see experiments/table.sh. PARTS="classes" runs one part. It continues where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=experiments/transformer_miniature
PARTS=${PARTS:-observation classes people}
export BACKBONE=mini-dit SEEDS=${SEEDS:-0,1}
export METHODS=${METHODS:-original,realera,realera-text,valera,valera-rounds,uce,rece,speed,oce,leace,mace-refinement,sld,ac,spm,esd-x,esd-u}

if [[ -n ${SEARCH:-} ]]; then
  METHODS="uce rece speed oce leace sld realera-text realera-value valera valera-rounds mace-refinement ac spm esd-x esd-u" \
    TASKS="object celebrity" HERE=$HERE/search RUNS=${RUNS:+$RUNS/search} experiments/tuning_rivals/run.sh
fi
for part in $PARTS; do
  case $part in
  observation)
    RESULTS=$HERE/observation.json experiments/value_space/run.sh backbone=mini-dit
    ${PYTHON:-.venv/bin/python} experiments/value_space/table.py "$HERE/observation.json" "$HERE/README.md"
    ;;
  classes) experiments/table.sh table1 transformer_miniature/classes transformer_miniature/classes realera ;;
  people) experiments/table.sh celebrity transformer_miniature/people transformer_miniature/people realera ;;
  esac
done
