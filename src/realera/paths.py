"""Where things stand: the config folder, the shipped data, the caches, and the names of a run's files.

Standard library only: the doors import it before anything heavy.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realera import disk
from realera.disk import Unwritten as Unwritten

HERE = Path(__file__).resolve().parent
CONF_DIR = next((p for p in (HERE / "conf", HERE.parents[1] / "conf") if (p / "train.yaml").is_file()), HERE / "conf")
TASK_DATA = HERE / "tasks" / "data"
MINIATURE = HERE / "miniature" / "weights"  # a diffusers folder, plus judge/

# The files of a run folder.
CONFIG = "config.yaml"
ERASED = "erased.safetensors"
MAP = "map.safetensors"
NEIGHBOURS = "neighbours.safetensors"
MANIFEST = "manifest.jsonl"
VERDICTS = "verdicts"  # one <judge>.jsonl each
METRICS = "metrics.json"
REPORT = "report.html"
IMAGES = "images"
FIT = "fit"  # the loop's checkpoints, until it has ended
LOSSES = "losses.jsonl"  # one line a logged step: {"step": int, "<term>": float, ...}
COSTS = "costs.json"  # wall time by stage, passes of the U-Net, parameters, peak memory
WANDB_ID = "wandb_id.txt"  # of the W&B run that it is
EDIT_INFO = "edit.json"  # what the edit did: condition number, per-layer change, spectrum, word shifts
LOCK = disk.LOCK  # of the process that is making the run; gone when it has ended


def cache_dir() -> Path:
    """$REALERA_CACHE, else the platform's user cache folder + /realera. Not created here."""
    if given := os.environ.get("REALERA_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "realera"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a path to write to; what was written there takes `path`'s place at the end, or vanishes on an exception.

    Raises:
        Unwritten: the disk is full, cannot be written, or does not take such a name.
    """
    with disk.explained(path), disk.temporary(path) as beside:
        yield beside
        if not beside.is_dir():
            beside.chmod(0o666 & ~_umask())
        elif path.is_dir():
            path.rmdir()  # an empty folder gives way to a whole one
        beside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all (UTF-8)."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def json_text(content: Any, **style: Any) -> str:
    """Content as JSON that every reader takes: NaN and infinity, which JSON has no words for, are null. style: of
    json.dumps."""
    return json.dumps(_sayable(content), allow_nan=False, **style)


def _sayable(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {_sayable(key): _sayable(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_sayable(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
