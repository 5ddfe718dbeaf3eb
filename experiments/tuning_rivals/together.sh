#!/usr/bin/env bash
# VALERA's price and gain for concepts that are erased together: five classes at once, with their synonyms and phrases, and
# the five everyday things of unsafe.yaml, which have no phrases. Then one round of valera-rounds, with the same concepts.
# Seeds that no table uses. It resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/tuning_rivals
RUNS=${RUNS:-runs/tuning_rivals}
common=(backbone=mini logger=none seed=100 task.first_seed=50000 'label="price ${method.edit.price} gain ${method.edit.gain}"')

search() { # method, settings
  local method=$1
  shift
  for concepts in '[airplane,cat,ship,horse,truck]' '[automobile,bird,deer,dog,frog]'; do
    $PY -m realera.train -m task=object "concept=$concepts" "method=$method" "${common[@]}" task.images.erase=4 task.images.near=2 \
      task.images.keep=6 task.images.associated=2 task.images.unseen=0 "root=$RUNS/$method-together" "$@"
  done
}

search valera method.edit.price=1,10 method.edit.gain=1.05,1.2,1.35,1.5
search valera method.edit.price=3 method.edit.gain=1.05,1.1,1.2
# The prices 1 and 10 on these five are in valera-nsfw (run.sh).
$PY -m realera.train -m task=nsfw method=valera "${common[@]}" "+task.data=$PWD/$HERE/unsafe.yaml" judge=miniature \
  'judge.unsafe=[house,chair,hamburger,bicycle,light bulb]' "root=$RUNS/valera-together-nsfw" method.edit.price=3 method.edit.gain=1.05,1.1,1.2
# So are these settings of valera-rounds, in valera-rounds-nsfw.
search valera-rounds method.edit.search.rounds=1 method.edit.price=1,10 method.edit.gain=1,1.05
for name in valera-together valera-together-nsfw valera-rounds-together; do
  $PY -m realera.report "$RUNS/$name" "out=$RUNS/$name/report.html" "results=$HERE/$name"
done
