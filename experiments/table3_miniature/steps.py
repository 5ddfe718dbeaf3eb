"""What each part of RealEra adds: python experiments/table3_miniature/steps.py RUNS_OR_SWEEP (run.sh calls it)

Writes steps.json: the differences between each system and the one before it, between pairs of the same class, seed and
image, with intervals over images (low, high) and over classes too (over_concepts).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

ORDER = "realera-closed-form", "realera-no-mining", "realera-no-beyond", "realera-text"


def main() -> None:
    steps = {}
    for before, after in pairwise(ORDER):
        with tempfile.TemporaryDirectory() as place:
            words = [sys.argv[1], f"out={place}/page.html", f"results={place}", f"base={before}"]
            subprocess.run([sys.executable, "-m", "realera.report", *words], check=True)
            rows = json.loads(Path(place, "results.json").read_text(encoding="utf-8"))["differences"]["rows"]
        steps[f"{before} to {after}"] = next(row["mean"] for row in rows if row["system"] == after)
    text = json.dumps(steps, indent=1) + "\n"
    Path(__file__).with_name("steps.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
