#!/usr/bin/env bash
# A sweep against separate first runs of the same cells, each with a cache of its own, on the miniature.
# CELLS=4 makes a sliver of it; PLACE keeps the runs elsewhere. A cell of either side that is finished is not redone, so
# delete PLACE to measure again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-.venv/bin/python}" experiments/sharing/measure.py --cells "${CELLS:-40}" --place "${PLACE:-runs/sharing}"
