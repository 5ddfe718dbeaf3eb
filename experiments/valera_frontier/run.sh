#!/usr/bin/env bash
# VALERA erases 1, 5, 10 and 24 people at once; other people are not kept by name, kept exactly or kept at a price, with
# three pairs of price and gain. Measures the residue of the erased people against the preservation of the others. On the
# miniature about 20 minutes of one core. It continues where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/valera_frontier
$PY $HERE/frontier.py "${RUNS:-runs/valera_frontier}" $HERE/results.json
$PY $HERE/page.py $HERE/results.json
