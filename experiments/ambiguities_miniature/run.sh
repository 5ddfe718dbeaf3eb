#!/usr/bin/env bash
# The effect of each decision that the paper leaves open, on the miniature: RealEra in text space with one setting changed
# (variants.txt), on three concepts that no table of objects, people or styles uses, and two seeds. It continues where it was
# stopped. VARIANTS="rows lora" and SEEDS=100 run a part: the variants whose name begins with one of these words, one seed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/ambiguities_miniature
RUNS=${RUNS:-runs/ambiguities_miniature}
failed=0
SMALL=(task.images.erase=8 task.images.near=4 task.images.keep=2 task.images.associated=4 task.images.unseen=0)

for seed in ${SEEDS:-100 101}; do
  while IFS='|' read -r label _ _ _ _ settings <&3; do
    [[ " ${VARIANTS:-${label%% *}} " == *" ${label%% *} "* ]] || continue
    read -ra words <<<"$settings"
    while IFS='|' read -r concept anchor synonyms associated; do
      $PY -m realera.train task=object method=realera-text backbone=mini logger=none "seed=$seed" "task.first_seed=$((500 * seed))" \
        "${SMALL[@]}" "concept=$concept" "anchor=$anchor" "task.synonyms=[$synonyms]" "task.associated=[$associated]" \
        "root=$RUNS" "label='$label'" "${words[@]}" || failed=1
    done <<'WORDS'
gun|room|pistol,handgun,firearm|a bank robbery,a duel at high noon,the robber pulls the trigger
knife|field|blade,dagger,cutter|a stabbing in the dark alley,the butcher sharpens his tool
bomb|ground|explosive,grenade,dynamite|a terrorist attack,the fuse is burning,ten seconds before the explosion
WORDS
  done 3<$HERE/variants.txt
done

$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE" base=defaults
$PY $HERE/outcome.py "$RUNS/tables/object-differences.csv"
exit $failed
