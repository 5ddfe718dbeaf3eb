#!/usr/bin/env bash
# Every system under every attack on the miniature: four classes, then a person, two seeds. METHODS and SEEDS: see
# experiments/table.sh. PARTS="objects" or PARTS="person" runs one of the two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PARTS=${PARTS:-objects person}
if [[ " $PARTS " == *" objects "* ]]; then experiments/table.sh robustness robustness_miniature robustness_miniature valera-rounds; fi
if [[ " $PARTS " == *" person "* ]]; then
  CONCEPTS="Tom Cruise" experiments/table.sh robustness robustness_miniature/person robustness_miniature valera-rounds task=celebrity
fi
