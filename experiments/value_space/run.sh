#!/usr/bin/env bash
# The observation that VALERA stands on: in which space what draws a concept lies near its name. On the miniature about
# three minutes; another model: experiments/value_space/run.sh backbone=sd14 backbone.pretrained=FOLDER
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PYTHON:-.venv/bin/python}
HERE=experiments/value_space
RESULTS=${RESULTS:-$HERE/observation.json}
$PY "$HERE/observe.py" "$RESULTS" noise=4 "$@"
[[ $RESULTS != "$HERE/observation.json" ]] || $PY "$HERE/table.py" "$RESULTS" "$HERE/README.md"
