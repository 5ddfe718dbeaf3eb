#!/usr/bin/env bash
# A sweep against separate first runs of the same cells, each with a cache of its own, on the miniature.
# CELLS=4 makes a sliver of it; PLACE keeps the runs elsewhere. It cannot go on with what was
# stopped, for a finished cell takes no time: PLACE must not be there yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-.venv/bin/python}" experiments/sharing/measure.py --cells "${CELLS:-40}" --place "${PLACE:-runs/sharing}"
