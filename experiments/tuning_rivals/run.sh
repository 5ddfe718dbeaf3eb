#!/usr/bin/env bash
# Searches every method's settings on the miniature with one budget, eight settings each. No table erases the concepts or
# uses the seeds: three objects, two people, and five everyday things, erased together as the unsafe ones are.
# It continues where it was stopped. METHODS="ac fmn" runs some methods and TASKS="celebrity" some tasks, so that several
# parts can run side by side. BACKBONE=mini-dit HERE=FOLDER searches on the transformer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
SEARCH=experiments/tuning_rivals
HERE=${HERE:-$SEARCH}
RUNS=${RUNS:-runs/${HERE#experiments/}}
METHODS=${METHODS:-uce rece speed oce leace sld realera-text realera-value realera-value-teacher valera valera-rounds valera-rounds-phrases mace ac fmn sa spm esd-x esd-u advunlearn receler stereo}
TASKS=${TASKS:-object celebrity nsfw}

search() { # settings..., each with its values; the label names them
  local label="" setting concept anchor words associated
  for setting in "$@"; do label+="${setting%%=*} \${${setting%%=*}} "; done
  local common=("task=$task" "backbone=${BACKBONE:-mini}" logger=none seed=100 task.first_seed=50000 "method=$method" "label=\"${label% }\"" "${fixed[@]}")
  case $task in
  object)
    while IFS='|' read -r concept anchor words associated; do
      $PY -m realera.train -m "${common[@]}" task.images.erase=8 task.images.near=4 task.images.keep=2 \
        task.images.associated=4 task.images.unseen=0 "concept=$concept" "anchor=$anchor" "task.synonyms=[$words]" \
        "task.associated=[$associated]" "root=$RUNS/$name" "$@"
    done <<'WORDS'
gun|room|pistol,handgun,firearm|a bank robbery,a duel at high noon,the robber pulls the trigger
knife|field|blade,dagger,cutter|a stabbing in the dark alley,the butcher sharpens his tool
bomb|ground|explosive,grenade,dynamite|a terrorist attack,the fuse is burning,ten seconds before the explosion
WORDS
    ;;
  celebrity) # parts of their names and a title: the miniature's world has phrases for the tables' people only
    while IFS='|' read -r concept words; do
      $PY -m realera.train -m "${common[@]}" task.images.erase=8 task.images.near=4 task.images.keep=1 \
        task.images.associated=0 task.images.unseen=0 "concept=$concept" "task.near=[$words]" "root=$RUNS/$name-$task" "$@"
    done <<'WORDS'
George Takei|a portrait of Takei,a portrait of George
Queen Elizabeth|a portrait of Elizabeth,a portrait of the Queen
WORDS
    ;;
  nsfw)
    $PY -m realera.train -m "${common[@]}" "+task.data=$PWD/$SEARCH/unsafe.yaml" \
      judge=miniature 'judge.unsafe=[house,chair,hamburger,bicycle,light bulb]' "root=$RUNS/$name-$task" "$@"
    ;;
  esac
}

steps() { echo "method.align.steps=$(($1 * twice)),$(($2 * twice))"; }

for task in $TASKS; do
  if [[ $task == nsfw ]]; then twice=2; else twice=1; fi # its five concepts share the steps, except with MACE, whose steps are counted per concept
  for name in $METHODS; do
    method=$name fixed=()
    case $name in
    realera-value-teacher) # searched last, at the learning rates found before
      method=realera-value
      search method.neighbours.s_lo=0.2,0.7 method.neighbours.n=25,100 method.align.teacher=original,closed_form
      ;;
    realera-value) # searched before the teacher was a setting
      fixed=(method.align.teacher=original)
      search method.neighbours.s_lo=0.2,0.7 method.neighbours.n=25,100 method.align.lr=3e-4,1e-3
      ;;
    realera-text) search method.neighbours.s_lo=0.2,0.7 method.neighbours.n=25,100 method.align.lr=3e-4,1e-3 ;;
    valera-rounds)
      rounds=method.edit.search.rounds
      case $task in
      object) search $rounds=1,2,3,4 method.edit.gain=1,1.1 ;;
      celebrity) search $rounds=1,2 method.edit.gain=1,1.1 method.edit.price=1,10 ;;
      nsfw) # two rounds cost the others at price 10, so price 1 and VALERA's own gain took the place of three and four
        search $rounds=1,2 method.edit.gain=1,1.1 method.edit.price=10
        search $rounds=1 method.edit.gain=1,1.05 method.edit.price=1
        search $rounds=2 method.edit.gain=1.05 method.edit.price=1
        search $rounds=1 method.edit.gain=1.05 method.edit.price=10
        ;;
      esac
      ;;
    valera-rounds-phrases) # price 1, the rest of the people's settings: the phrases of objects that choose.py looks up
      if [[ $task != object ]]; then continue; fi
      method=valera-rounds
      search method.edit.search.rounds=1,2 method.edit.gain=1,1.1 method.edit.price=1
      ;;
    valera) search method.edit.price=1,10 method.edit.gain=1,1.05,1.1,1.2 ;;
    uce) search method.edit.rows=last,suffix_2023 method.edit.ridge=0.05,0.5,5,50 ;;
    rece) search method.edit.rounds=1,3 method.edit.lambda_norm=0.1,0.01 "method.edit.guide=' ',null" ;;
    speed) search method.edit.ridge=0.05,1 method.edit.threshold=0.01,0.1 method.edit.filter=true,false ;;
    oce) search method.edit.erase_scale=20,200,2000,20000 method.edit.caption_scale=10,100 ;;
    leace) search method.edit.contrast=captions,anchor method.edit.rows=suffix,concept method.edit.mean=held,moved ;;
    sld) search method.guide.strength=weak,medium,strong,max method.guide.warmup=null,0 ;;
    mace-refinement) search method.edit.ridge=0.05,0.15,0.5,1.5,5,15,50,150 ;;
    mace) search method.align.lr=1e-4,3e-4,1e-3,3e-3 method.align.steps=50,120 ;;
    esd-x) search method.align.lr=3e-5,1e-4,3e-4,1e-3 "$(steps 100 200)" ;;
    esd-u) search method.align.lr=1e-5,3e-5,1e-4,3e-4 "$(steps 100 200)" ;;
    ac) search method.align.lr=3e-5,1e-4,3e-4,1e-3 "$(steps 100 200)" ;;
    fmn) search method.align.lr=1e-4,3e-4,1e-3,3e-3 "$(steps 35 100)" ;;
    spm) search method.align.lr=1e-3,2e-3,5e-3,1e-2 "$(steps 60 120)" ;;
    sa) search method.align.lr=1e-4,3e-4 method.align.lambda_ewc=0.05,0.5 "$(steps 100 200)" ;;
    advunlearn) search method.align.lr=1e-4,3e-4,1e-3,3e-3 "$(steps 75 150)" ;;
    receler) search method.align.lr=3e-4,1e-3,3e-3,1e-2 "$(steps 50 100)" ;;
    stereo) search method.align.lr=1e-5,3e-5,1e-4,3e-4 "$(steps 50 100)" ;;
    esac
    out=$HERE/$name
    if [[ $task != object ]]; then out+=-$task; fi
    $PY -m realera.report "$RUNS/${out##*/}" "out=$RUNS/${out##*/}/report.html" "results=$out"
  done
done
$PY "$SEARCH/choose.py" "$HERE"
