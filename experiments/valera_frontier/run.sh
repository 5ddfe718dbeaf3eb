#!/usr/bin/env bash
# 1, 5, 10 and 24 people erased at once by VALERA, other people kept not at all, exactly or at a price, with two gains:
# what is left of the ones against what is kept of the others. On the miniature about 15 minutes of one core; it resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/valera_frontier
$PY $HERE/frontier.py "${RUNS:-runs/valera_frontier}" $HERE/results.json
$PY $HERE/page.py $HERE/results.json
