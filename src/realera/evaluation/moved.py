"""Change of a preserved concept's image relative to the unedited model's image of the same prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from realera.contracts import UserError, Verdict
from realera.evaluation.records import ManifestEntry
from realera.files.pictures import read_picture


def moved(before: Path, after: Path) -> float:
    """The root mean square difference of two images over pixels and channels, in percent of the value range: 0 if they
    are equal, 100 between black and white. It also measures harmless changes. Raises UserError if an image cannot be
    read or the sizes differ."""
    was, now = (np.asarray(read_picture(path), dtype=np.float32) for path in (before, after))
    if was.shape != now.shape:
        raise UserError(f"{before} and {after} differ in size: remove the run folder and run it again")
    return float(np.sqrt(np.square(now - was).mean()) / 2.55)


def add_moved(verdicts: Sequence[Verdict], rows: Sequence[ManifestEntry], run_dir: Path) -> list[Verdict]:
    """Adds detail["moved"] to the verdicts on preserved concepts, if the run has the original images."""
    return [
        replace(v, detail={**v.detail, "moved": round(moved(row.path(run_dir, "original"), row.path(run_dir)), 4)})
        if row.prompt.split == "keep" and row.original is not None
        else v
        for v, row in zip(verdicts, rows, strict=True)
    ]
