#!/usr/bin/env bash
# Every method's settings on the miniature, by one budget: eight settings on three concepts that no table of objects,
# people or styles uses, from seeds that none uses. It resumes; METHODS="ac fmn" runs some of them, so that several can
# run side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/tuning_rivals
RUNS=${RUNS:-runs/tuning_rivals}
METHODS=${METHODS:-uce rece sld realera mace ac fmn sa spm esd-x esd-u}
SMALL=(task.images.erase=8 task.images.near=4 task.images.keep=2 task.images.associated=4 task.images.unseen=0)

search() { # settings..., each with its values; the label names them
  local label="" setting
  for setting in "$@"; do label+="${setting%%=*} \${${setting%%=*}} "; done
  while IFS='|' read -r concept anchor synonyms associated; do
    $PY -m realera.train -m task=object backbone=mini logger=none seed=100 task.first_seed=50000 "${SMALL[@]}" \
      "method=$method" "concept=$concept" "anchor=$anchor" "task.synonyms=[$synonyms]" "task.associated=[$associated]" \
      "root=$RUNS/$method" "label=\"${label% }\"" "$@"
  done <<'WORDS'
gun|room|pistol,handgun,firearm|a bank robbery,a duel at high noon,the robber pulls the trigger
knife|field|blade,dagger,cutter|a stabbing in the dark alley,the butcher sharpens his tool
bomb|ground|explosive,grenade,dynamite|a terrorist attack,the fuse is burning,ten seconds before the explosion
WORDS
}

for method in $METHODS; do
  case $method in
  realera) search method.neighbours.s_lo=0.2,0.7 method.neighbours.n=25,100 method.align.lr=3e-4,1e-3 ;;
  uce) search method.edit.rows=last,suffix_2023 method.edit.ridge=0.05,0.5,5,50 ;;
  rece) search method.edit.rounds=1,3 method.edit.lambda_norm=0.1,0.01 "method.edit.guide=' ',null" ;;
  sld) search method.guide.strength=weak,medium,strong,max method.guide.warmup=null,0 ;;
  mace) search method.align.lr=1e-4,3e-4,1e-3,3e-3 method.align.steps=50,120 ;;
  esd-x) search method.align.lr=3e-5,1e-4,3e-4,1e-3 method.align.steps=100,200 ;;
  esd-u) search method.align.lr=1e-5,3e-5,1e-4,3e-4 method.align.steps=100,200 ;;
  ac) search method.align.lr=3e-5,1e-4,3e-4,1e-3 method.align.steps=100,200 ;;
  fmn) search method.align.lr=1e-4,3e-4,1e-3,3e-3 method.align.steps=35,100 ;;
  spm) search method.align.lr=1e-3,2e-3,5e-3,1e-2 method.align.steps=60,120 ;;
  sa) search method.align.lr=1e-4,3e-4 method.align.lambda_ewc=0.05,0.5 method.align.steps=100,200 ;;
  esac
  mkdir -p "$HERE/$method"
  $PY -m realera.report "$RUNS/$method" "out=$RUNS/$method/report.html" "results=$HERE/$method"
done
$PY "$HERE/choose.py"
