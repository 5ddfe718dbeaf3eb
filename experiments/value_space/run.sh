#!/usr/bin/env bash
# The observation that VALERA stands on: in which space what draws a concept lies near its name. On the miniature about
# ten minutes, with which words draw a concept (draws.py); another model: experiments/value_space/run.sh backbone=sd14 backbone.pretrained=FOLDER
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/value_space
RESULTS=${RESULTS:-$HERE/observation.json}
$PY "$HERE/observe.py" "$RESULTS" noise=4 "$@"
[[ $RESULTS == "$HERE/observation.json" ]] || exit 0 # what follows is of the miniature and its judge
$PY "$HERE/table.py" "$RESULTS" "$HERE/README.md"
$PY "$HERE/draws.py" "$HERE/draws.json"
