"""How far an image of what should stay moved from the one that the unedited model draws of the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from realera.contracts import UserError, Verdict
from realera.evaluation.records import Row
from realera.files.pictures import read_picture


def moved(before: Path, after: Path) -> float:
    """The root mean square difference of two images' pixels and channels, in percent of their range: 0 where they are
    equal, 100 between black and white. It sees any change, also one that nobody would mind. Raises UserError where they
    cannot be read, or differ in size."""
    was, now = (np.asarray(read_picture(path), dtype=np.float32) for path in (before, after))
    if was.shape != now.shape:
        raise UserError(f"{before} and {after} differ in size: remove the folder, and run it again")
    return float(np.sqrt(np.square(now - was).mean()) / 2.55)


def with_moves(verdicts: Sequence[Verdict], rows: Sequence[Row], run_dir: Path) -> list[Verdict]:
    """The verdicts, those on images of what should stay with detail["moved"], where the original's image is there."""
    return [
        replace(v, detail={**v.detail, "moved": round(moved(row.path(run_dir, "original"), row.path(run_dir)), 4)})
        if row.prompt.split == "keep" and row.original is not None
        else v
        for v, row in zip(verdicts, rows, strict=True)
    ]
