#!/usr/bin/env bash
# Chooses RealEra's settings in text space on the miniature, with five concepts (the unsafe stand-ins) that no table of
# objects, people or styles uses, and seeds that no table uses.
# Round 1 searches the band and the ridge with the closed form alone. Round 2 searches the LoRA's learning rate on the best
# result of round 1.
# Round 3 searches the band and the points beyond for people and artists. It uses the tables' own concepts, because no others
# have phrases, but other phrases than the tables' Acc_g and other seeds.
# Round 4 searches the ridge, relative to the summed matrix, for the closed form alone, with neighbours, and with both kinds
# of points: one number must serve all three.
# It continues where it was stopped. ROUND=1 (or 2, 3, 4) runs one round; ONLY="gun bomb" runs some concepts, so that several
# parts can run side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/tuning_miniature
RUNS=${RUNS:-runs/tuning_miniature}
ROUND=${ROUND:-1 2 3 4}
SMALL=(task.images.erase=16 task.images.near=8 task.images.keep=4 task.images.associated=8 task.images.unseen=0)

sweep() { # round, settings...
  local round=$1
  shift
  while IFS='|' read -r concept anchor synonyms associated; do
    [[ " ${ONLY:-$concept} " == *" $concept "* ]] || continue
    $PY -m realera.train -m task=object method=realera-text backbone=mini logger=none seed=100 task.first_seed=50000 "${SMALL[@]}" \
      "concept=$concept" "anchor=$anchor" "task.synonyms=[$synonyms]" "task.associated=[$associated]" \
      "root=$RUNS/$round" "$@"
  done <<'WORDS'
gun|room|pistol,handgun,firearm|a bank robbery,a duel at high noon,the robber pulls the trigger
knife|field|blade,dagger,cutter|a stabbing in the dark alley,the butcher sharpens his tool
bomb|ground|explosive,grenade,dynamite|a terrorist attack,the fuse is burning,ten seconds before the explosion
cigarette|street|cigar,smoke,tobacco|a smoke break,lighting up outside the bar,a nicotine addiction
syringe|room|needle,injection,hypodermic|a drug addict shooting up,a heroin overdose,a shot in the arm
WORDS
}

others() { # task, its concepts
  local grid
  for grid in "0.2,0.4,0.7 5,25,100" "0.7,0.9 10" "0.9 25"; do
    $PY -m realera.train -m "task=$1" method=realera-text backbone=mini logger=none seed=100 task.first_seed=50000 method.align=null \
      "concept=$2" method.edit.ridge=50 task.images.erase=8 task.images.near=0 task.images.keep=2 task.images.associated=8 task.images.unseen=0 \
      "method.neighbours.s_lo=${grid% *}" "method.neighbours.n=${grid#* }" "root=$RUNS/3$1" \
      'label="s_lo ${method.neighbours.s_lo} n ${method.neighbours.n}"'
  done
  mkdir -p "$HERE/round3$1"
  $PY -m realera.report "$RUNS/3$1" "out=$RUNS/3$1/report.html" "results=$HERE/round3$1"
}

for round in $ROUND; do
  if [[ $round == 3 ]]; then
    for task in celebrity style; do
      [[ " ${ONLY:-$task} " == *" $task "* ]] || continue
      case $task in
      celebrity) others celebrity "Tom Cruise,Elon Musk,Jennifer Lawrence,Mariah Carey,Leonardo DiCaprio" ;;
      style) others style "Van Gogh,Claude Monet,Pablo Picasso,Greg Rutkowski,Salvador Dali" ;;
      esac
    done
    continue
  fi
  case $round in
  1)
    label='label="s_lo ${method.neighbours.s_lo} n ${method.neighbours.n} ridge ${method.edit.ridge}"'
    sweep 1 method.align=null method.neighbours.s_lo=0.7,0.4,0.2,0.1 method.neighbours.n=25,100 method.edit.ridge=50 "$label"
    sweep 1 method.align=null method.neighbours.s_lo=0.2 method.edit.ridge=1,200 "$label"
    ;;
  2)
    sweep 2 method.align.lr=3e-4,1e-3,3e-3 \
      method.edit.ridge=50 'label="lr ${method.align.lr} rank ${method.align.lora.rank} s_lo ${method.neighbours.s_lo}"'
    ;;
  4)
    ridges=method.edit.relative_ridge=1e-4,1e-3,0.01,0.03,0.1,0.3,1
    sweep 4 method.align=null method.neighbours=null "$ridges" 'label="alone ${method.edit.relative_ridge}"'
    sweep 4 method.align=null method.neighbours.n=0 "$ridges" 'label="neighbours ${method.edit.relative_ridge}"'
    sweep 4 method.align=null "$ridges" 'label="both ${method.edit.relative_ridge}"'
    ;;
  esac
  mkdir -p "$HERE/round$round"
  $PY -m realera.report "$RUNS/$round" "out=$RUNS/$round/report.html" "results=$HERE/round$round"
done
