"""Times a sweep of the miniature and the same cells as separate runs, and compares their metrics and images."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = [
    "task=object",
    "concept=airplane",
    "backbone=mini",
    "trainer=cpu",
    "logger=none",
    "task.images={erase:4,near:1,keep:1,associated:0,unseen:0}",
    "method.align.steps=5",
    "method.latents.images=32",
]
DISTANCES = ["4", "7", "10", "14", "18"]
COSINES = ["0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=40)
    parser.add_argument("--place", type=Path, default=Path("runs/sharing"))
    given = parser.parse_args()
    grid = [(d1, s_lo) for s_lo in COSINES for d1 in DISTANCES][: given.cells]
    distances = list(dict.fromkeys(d1 for d1, _ in grid))
    cosines = list(dict.fromkeys(s_lo for _, s_lo in grid))
    if len(distances) * len(cosines) != len(grid):
        sys.exit(f"error: {given.cells} cells do not form a grid: give a multiple of {len(DISTANCES)}, or fewer.")
    place = given.place.resolve()
    if place.exists():
        sys.exit(f"error: {place} already exists: delete it to measure again, or give another --place.")

    axes = [f"method.neighbours.d1={','.join(distances)}", f"method.neighbours.s_lo={','.join(cosines)}"]
    sweep = run(place / "sweep", "-m", *axes)
    alone = []
    for number, (d1, s_lo) in enumerate(grid, 1):
        alone.append(run(place / f"alone{number}", f"method.neighbours.d1={d1}", f"method.neighbours.s_lo={s_lo}"))
        print(f"separate run {number} of {len(grid)}: {alone[-1][0]:.1f} s", flush=True)
    differs = [folder.name for folder in sorted(place.glob("sweep/runs/airplane-*")) if not same(folder, place)]
    seconds, busy = (sum(values) for values in zip(*alone))
    result = {
        "cells": len(grid),
        "sweep": {"seconds": round(sweep[0], 1), "processor_seconds": round(sweep[1], 1)},
        "separate": {"seconds": round(seconds, 1), "processor_seconds": round(busy, 1)},
        "ratio": round(sweep[0] / seconds, 3),
        "ratio_of_processor_time": round(sweep[1] / busy, 3),
        "cells_with_other_numbers": differs,
    }
    (place / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    if len(grid) == len(DISTANCES) * len(COSINES):
        shutil.copy(place / "results.json", Path(__file__).with_name("results.json"))
    print(json.dumps(result, indent=1))
    if differs:
        sys.exit("error: a cell of the sweep differs from its separate run.")


def run(place: Path, *words: str) -> tuple[float, float]:
    """Runs one command in its own folder, with its own cache. Returns wall-clock seconds and processor seconds."""
    place.mkdir(parents=True)
    env = {**os.environ, "REALERA_CACHE": str(place / "cache"), "REALERA_STAMP": "sharing"}
    before, began = children(), time.perf_counter()
    command = [sys.executable, "-m", "realera.train", *words, *SETTINGS]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began, children() - before


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def same(folder: Path, place: Path) -> bool:
    """Whether the separate run of a cell has the same numbers and the same images, bit for bit."""
    (other,) = place.glob(f"alone*/runs/{folder.name}")
    names = ["metrics.json", *(f"images/{image.name}" for image in folder.glob("images/*.png"))]
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


if __name__ == "__main__":
    main()
