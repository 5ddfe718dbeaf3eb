#!/usr/bin/env bash
# Searches every attack's settings on the miniature with one budget: eight settings each, against three concepts that no table
# erases, taken out by a closed form that leaves residue (UCE) and by one that does not (VALERA). Attacks that know the text encoder
# alone are also carried out on the unedited model. It continues where it was stopped. ATTACKS="p4d mma" searches some attacks, so
# that several parts can run side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/tuning_attacks
RUNS=${RUNS:-runs/tuning_attacks}
ATTACKS=${ATTACKS:-closed-form inversion unlearndiff relearn p4d ring-a-bell mma}

images="task.images={erase:8,near:0,keep:1,associated:0,unseen:0}"
runs=() concepts=()
while IFS='|' read -r concept anchor; do
  words=(task=object "concept=$concept" "anchor=$anchor" backbone=mini logger=none seed=100 task.first_seed=50000 "$images")
  for method in uce valera; do
    run=$RUNS/$concept-$method
    [[ -f $run/metrics.json ]] || $PY -m realera.train "${words[@]}" "method=$method" "run_dir=$run"
    runs+=("$run")
  done
  concepts+=("$concept|$anchor")
done <<'WORDS'
gun|room
knife|field
bomb|ground
WORDS

search() { # settings..., each with its values; the attack's name has the values, so that all results stay side by side
  local name=$attack setting
  for setting in "$@"; do name+="-\${${setting%%=*}}"; done
  local typed=("attack=$attack" "attack.name='$name'" limit=2 attack_seed=100 logger=none "$@") each
  $PY -m realera.attack -m "run=$(IFS=,; echo "${runs[*]}")" "${typed[@]}"
  [[ $attack == ring-a-bell || $attack == mma ]] || return 0
  for each in "${concepts[@]}"; do
    $PY -m realera.attack -m run=original task=object "concept=${each%|*}" "anchor=${each#*|}" backbone=mini seed=100 \
      task.first_seed=50000 "$images" "run_dir=$RUNS/${each%|*}-original" "${typed[@]}"
  done
}

for attack in $ATTACKS; do
  case $attack in
  closed-form) search attack.lambda_norm=0.01,0.03,0.1,0.3,1,3,10,30 ;;
  inversion) search attack.lr=1e-3,5e-3,2e-2,5e-2 attack.steps=250,500 ;;
  unlearndiff) search attack.lr=0.03,0.1,0.3,1 attack.timesteps=10,20 attack.iterations=20 ;;
  p4d) search attack.lr=0.03,0.1,0.3,1 attack.tokens=4,8 ;;
  ring-a-bell) search attack.eta=1,2,3,5 attack.tokens=4,8 ;;
  mma) search attack.tokens=4,6,8,10 attack.vocabulary=all,words ;;
  relearn) search attack.lr=3e-4,1e-3,3e-3,1e-2 attack.rank=4,16 ;;
  esac
done
$PY "$HERE/choose.py" "$RUNS"
