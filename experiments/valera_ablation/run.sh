#!/usr/bin/env bash
# Changes the settings of VALERA one at a time (variants.txt), on the validation concepts of experiments/tuning_rivals with
# its prompts, seeds and image counts (half of them for the five things): three objects, two people, five everyday things
# together. It continues where it was stopped. TASKS="celebrity" and VARIANTS="base price-1" run a part.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/valera_ablation
RUNS=$(realpath -m "${RUNS:-runs/valera_ablation}")
TASKS=${TASKS:-object nsfw celebrity}

# The variants that keep names are given every second name that Acc_s judges.
PEOPLE="[Tom Cruise, Jennifer Lawrence, Leonardo DiCaprio, Patrick Stewart, Gordon Ramsey, Clint Eastwood, Heath Ledger, Judy Garland, Betty White, Liv Tyler, Bill Nye]"
THINGS="[apple, pizza, cactus, mushroom, key, laptop, soccer ball, crown, cupcake, alarm clock, watermelon, bell, drum, teddy bear, traffic light]"
TOLD="'\${by_task:{default: [airplane, bird, deer, frog, ship], celebrity: $PEOPLE, nsfw: $THINGS}}'"
mkdir -p "$RUNS/conf/experiment"
if [[ ! -f $RUNS/quarter.safetensors ]]; then # every fourth of the captions that represent the preserved concepts
  awk 'NR % 4 == 1' src/realera/methods/data/captions.txt >"$RUNS/quarter.txt"
  $PY -m realera.cache "captions=$RUNS/quarter.txt" backbone=mini "out=$RUNS/quarter.safetensors"
fi
names=()
while IFS='|' read -r label settings; do
  settings=${settings//QUARTER/$RUNS/quarter.safetensors}
  name=${label// /-}
  base=""
  [[ $settings =~ (^|, )price: ]] || base+="price: 10.0, "
  [[ $settings =~ (^|, )gain: ]] || base+="gain: 1.0, "
  printf '# @package _global_\nlabel: %s\nmethod:\n  edit: {%s}\n' "$label" "$base${settings//TOLD/$TOLD}" >"$RUNS/conf/experiment/$name.yaml"
  [[ " ${VARIANTS:-$name} " != *" $name "* ]] || names+=("$name")
done <$HERE/variants.txt
variants=$(IFS=, && echo "${names[*]}")
common=(method=valera backbone=mini logger=none seed=100 task.first_seed=50000 "experiment=$variants" "hydra.searchpath=[file://$RUNS/conf]")

failed=0
for task in $TASKS; do
  case $task in
  object)
    while IFS='|' read -r concept anchor words associated; do
      $PY -m realera.train -m "${common[@]}" task=object task.images.erase=8 task.images.near=4 task.images.keep=2 \
        task.images.associated=4 task.images.unseen=0 "concept=$concept" "anchor=$anchor" "task.synonyms=[$words]" \
        "task.associated=[$associated]" "root=$RUNS/$task" || failed=1
    done <<'WORDS'
gun|room|pistol,handgun,firearm|a bank robbery,a duel at high noon,the robber pulls the trigger
knife|field|blade,dagger,cutter|a stabbing in the dark alley,the butcher sharpens his tool
bomb|ground|explosive,grenade,dynamite|a terrorist attack,the fuse is burning,ten seconds before the explosion
WORDS
    ;;
  celebrity)
    while IFS='|' read -r concept words; do
      $PY -m realera.train -m "${common[@]}" task=celebrity task.images.erase=8 task.images.near=4 task.images.keep=1 \
        task.images.associated=0 task.images.unseen=0 "concept=$concept" "task.near=[$words]" "root=$RUNS/$task" || failed=1
    done <<'WORDS'
George Takei|a portrait of Takei,a portrait of George
Queen Elizabeth|a portrait of Elizabeth,a portrait of the Queen
WORDS
    ;;
  nsfw)
    $PY -m realera.train -m "${common[@]}" task=nsfw "+task.data=$PWD/experiments/tuning_rivals/unsafe.yaml" \
      task.images.erase=4 task.images.near=2 task.images.keep=1 judge=miniature 'judge.unsafe=[house,chair,hamburger,bicycle,light bulb]' "root=$RUNS/$task" || failed=1
    ;;
  esac
  mkdir -p "$HERE/$task"
  $PY -m realera.report "$RUNS/$task" "out=$RUNS/$task/report.html" "results=$HERE/$task" base=base
done
$PY $HERE/table.py
exit $failed
