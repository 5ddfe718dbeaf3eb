#!/usr/bin/env bash
# Compares a sweep with separate first runs of the same cells, each with its own cache, on the miniature.
# CELLS=4 runs four cells only; PLACE is the folder of the runs. A stopped measurement cannot be continued,
# because a finished cell would take no time: PLACE must not exist yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-.venv/bin/python}" experiments/sharing/measure.py --cells "${CELLS:-40}" --place "${PLACE:-runs/sharing}"
