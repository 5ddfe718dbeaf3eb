#!/usr/bin/env bash
# VALERA with RealEra's LoRA on top (conf/method/valera-aligned.yaml) beside VALERA, on the concepts of the search: three objects,
# and five everyday things erased together. It continues where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/tuning_rivals
RUNS=${RUNS:-runs/second_stage}
common=(backbone=mini logger=none seed=100 task.first_seed=50000 "hydra.searchpath=[file://$PWD/$HERE/second_stage/conf]" method=valera,valera-aligned)
while IFS='|' read -r concept anchor words associated; do
  $PY -m realera.train -m "${common[@]}" task=object task.images.erase=8 task.images.near=4 task.images.keep=2 task.images.associated=4 \
    task.images.unseen=0 "concept=$concept" "anchor=$anchor" "task.synonyms=[$words]" "task.associated=[$associated]" "root=$RUNS/objects"
done <<'WORDS'
gun|room|pistol,handgun,firearm|a bank robbery,a duel at high noon,the robber pulls the trigger
knife|field|blade,dagger,cutter|a stabbing in the dark alley,the butcher sharpens his tool
bomb|ground|explosive,grenade,dynamite|a terrorist attack,the fuse is burning,ten seconds before the explosion
WORDS
$PY -m realera.train -m "${common[@]}" task=nsfw "+task.data=$PWD/$HERE/unsafe.yaml" judge=miniature \
  'judge.unsafe=[house,chair,hamburger,bicycle,light bulb]' "root=$RUNS/nsfw"
for kind in objects nsfw; do
  $PY -m realera.report "$RUNS/$kind" "out=$RUNS/$kind.html" "results=$HERE/second_stage/$kind"
done
