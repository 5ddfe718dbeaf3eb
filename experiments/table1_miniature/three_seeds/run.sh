#!/usr/bin/env bash
# Table 1's leading systems and the unedited model, with three seeds. CONCEPTS and SEEDS: see experiments/table.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
export METHODS=${METHODS:-original,valera,valera-rounds,realera,oce,sa}
experiments/table.sh table1 table1_miniature/three_seeds table1_miniature valera
