#!/usr/bin/env bash
# The observation behind VALERA: in which space a concept's name is near the texts that draw the concept (observe.py), and
# which words draw a concept (draws.py). On the miniature about ten minutes. Another model:
# RESULTS=sd14.json experiments/value_space/run.sh backbone=sd14 backbone.pretrained=FOLDER
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/value_space
RESULTS=${RESULTS:-$HERE/observation.json}
$PY "$HERE/observe.py" "$RESULTS" noise=4 "$@"
[[ $RESULTS == "$HERE/observation.json" ]] || exit 0 # the rest needs the miniature and its judge
$PY "$HERE/table.py" "$RESULTS" "$HERE/README.md"
$PY "$HERE/draws.py" "$HERE/draws.json"
