#!/usr/bin/env bash
# Where VALERA fails, compared with UCE: difficult erasures (limits.py). On the miniature about ten minutes of one core. It
# continues where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/valera_limits
$PY $HERE/limits.py "${RUNS:-runs/valera_limits}" $HERE/results.json
$PY $HERE/table.py $HERE/results.json
