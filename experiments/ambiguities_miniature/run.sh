#!/usr/bin/env bash
# What each decision that the paper leaves open does on the miniature: RealEra with one setting changed, on three
# concepts that no table of objects, people or styles uses, two seeds. It resumes; VARIANTS="rows noise_sharing" runs some.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/ambiguities_miniature
RUNS=${RUNS:-runs/ambiguities_miniature}
SMALL=(task.images.erase=8 task.images.near=4 task.images.keep=2 task.images.associated=4 task.images.unseen=0)

variant() { # label, setting or nothing
  [[ " ${VARIANTS:-${1%% *}} " == *" ${1%% *} "* ]] || return 0
  while IFS='|' read -r concept anchor synonyms associated; do
    for seed in 100 101; do
      REALERA_STAMP="ambiguities-$(tr -c 'a-z0-9\n' - <<<"${1,,}")" $PY -m realera.train -m task=object backbone=mini \
        logger=none "seed=$seed" "task.first_seed=$((500 * seed))" "${SMALL[@]}" "concept=$concept" "anchor=$anchor" \
        "task.synonyms=[$synonyms]" "task.associated=[$associated]" "root=$RUNS" "label=$1" "${@:2}"
    done
  done <<'WORDS'
gun|room|pistol,handgun,firearm|a bank robbery,a duel at high noon,the robber pulls the trigger
knife|field|blade,dagger,cutter|a stabbing in the dark alley,the butcher sharpens his tool
bomb|ground|explosive,grenade,dynamite|a terrorist attack,the fuse is burning,ten seconds before the explosion
WORDS
}

N=method.neighbours
A=method.align
variant "defaults"
variant "literal_break" $N.literal_break=true                # A1
variant "filter zero" $N.filter=zero                         # A2
variant "gamma_role loss_terms_swapped" $A.gamma_role=loss_terms_swapped # A4
variant "gamma_role step_mix" $A.gamma_role=step_mix
variant "gamma_role none" $A.gamma_role=none
variant "band of the gammas" $N.s_hi=0.7 $N.s_lo=0.3         # A4, read as thresholds
variant "s_lo 0.7" $N.s_lo=0.7                               # A5
variant "d1_anchor 0" $N.d1_anchor=0                         # A7
variant "anchor_dir own" $N.anchor_dir=own                   # A8
variant "radius_law volume" $N.radius_law=volume             # A10
variant "m_step 4 n_step 4" $A.m_step=4 $A.n_step=4          # A11
variant "unit flat" $N.unit=flat                             # A12
variant "rows concept" $N.rows=concept method.edit.rows=concept # A13, A15
variant "rows to_eos" $N.rows=to_eos method.edit.rows=to_eos
variant "rows all_but_bos" $N.rows=all_but_bos method.edit.rows=all_but_bos
variant "noise_sharing shared" $N.noise_sharing=shared       # A14
variant "lambda_preserve 1" method.edit.lambda_preserve=1    # A17
variant "prior_cache everyday" method.edit.prior_cache=everyday # A19
variant "teacher closed_form" $A.teacher=closed_form         # A20
variant "lora rank 4" $A.lora.rank=4                         # A21
variant "lora init kaiming" $A.lora.init=kaiming
variant "noise_anchor perturbed" $A.noise_anchor=perturbed   # A24
variant "direction isotropic" $N.direction=isotropic
variant "expectation" $N.m=.inf $N.n=.inf                    # the limit of M and N, in their weights
$PY -m realera.report "$RUNS" "out=$RUNS/report.html" "results=$HERE"
