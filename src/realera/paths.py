"""Where things stand: the config folder, the shipped data, the caches, and the names of a run's files.

Standard library only: the commands import it before anything heavy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from realera.contracts import UserError

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
ORIGINALS = "originals"  # the unedited model's images of the same prompts, linked from the cache
FIT = "fit"  # the loop's checkpoints, until it has ended
LAST = f"{FIT}/last.ckpt"
LOSSES = "losses.jsonl"  # one line a logged step: {"step": int, "<term>": float, ...}
COSTS = "costs.json"  # wall time by stage, passes of the U-Net, parameters, peak memory
WANDB_ID = "wandb_id.txt"  # of the W&B run that it is
FORMATS = ("PNG", "JPEG", "WEBP")  # of images that are read: other readers of pillow's start programs (EPS), or are old
RESIDUE, RESIDUE_PAGE = "residue.json", "residue.html"  # which texts draw the concept, before and after
EDIT_INFO = "edit.json"  # what the edit did: condition number, per-layer change, spectrum, word shifts
LOCK = ".lock"  # of the process that is making the run; gone when it has ended
OF_THE_FIT = (MAP, NEIGHBOURS, EDIT_INFO, LOSSES)  # what it leaves beside the erased weights, which name their digests

# The files of a sweep.
SWEEPS = "sweeps"  # the folder of all sweeps, in that of the runs
LISTED = "runs.txt"  # the run folders of a sweep, one a line
CELLS = "cells.jsonl"  # how each job ended: see `sweeps.jobs`
PLAN = "plan.json"
FAILED = "failed"  # tracebacks
TABLES, FIGURES = "tables", "figures"  # beside the page
RESULTS, README = "results.json", "README.md"  # of results=FOLDER
OF_A_SWEEP = (LISTED, CELLS, PLAN, FAILED, REPORT, TABLES, FIGURES, RESULTS, "multirun.yaml")  # the last is Hydra's


_cache: ContextVar[Path | None] = ContextVar("cache", default=None)


@contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    """In here `folder` is the cache."""
    token = _cache.set(folder)
    try:
        yield
    finally:
        _cache.reset(token)


def cache_dir() -> Path:
    """`cache_at`'s, else $REALERA_CACHE, else $XDG_CACHE_HOME/realera, else ~/.cache/realera. Not created here."""
    if (chosen := _cache.get()) is not None:
        return chosen
    if given := os.environ.get("REALERA_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "realera"


def file_of(text: Any) -> Path | None:
    """The file of a typed name, "~" filled in; None where there is none. Such a name may be too long, or name the home
    of an unknown user."""
    return _standing(text, Path.is_file)


def dir_of(text: Any) -> Path | None:
    """As `file_of`, of a folder."""
    return _standing(text, Path.is_dir)


def _standing(text: Any, test: Callable[[Path], bool]) -> Path | None:
    try:
        place = Path(str(text)).expanduser()
        return place if test(place) else None
    except (OSError, ValueError, RuntimeError):
        return None


def inside(folder: Path, name: str | Path) -> Path:
    """folder/name, for a name that a file holds or that a folder from elsewhere may have turned into a link.

    The name is relative and has no "..", and no part of it below `folder` is a symbolic link; `folder` itself may be
    one. The file need not exist. Raises UserError.
    """
    text = str(name)
    windows = PureWindowsPath(text)
    if not text or "\0" in text or windows.drive or windows.root or ".." in windows.parts:
        raise UserError(f"{folder} names the file {text[:200]!r}, which is not inside it: do not use this folder.")
    place = folder
    try:
        for part in PurePosixPath(text).parts:
            place = place / part
            if place.is_symlink():
                raise UserError(
                    f"{place} is a symbolic link, and a run's files must be in its own folder: put the file itself in "
                    "its place (cp -L), or remove it."
                )
    except (OSError, ValueError):
        raise UserError(
            f"{folder} names the file {text[:200]!r}, which cannot be one: do not use this folder."
        ) from None
    return place


def no_links(folder: Path, names: Iterable[str]) -> None:
    """None of the files and folders of these names may be a symbolic link: what is read, written and deleted through it
    would be somebody else's. Raises UserError."""
    for name in names:
        inside(folder, name)
    logged = folder / "wandb"
    for entry in os.scandir(logged) if logged.is_dir() else ():  # W&B links to the latest of its own
        if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(os.path.realpath(logged)):
            raise UserError(f"{entry.path} is a symbolic link out of the run's folder: remove it.")


def refuse_odd(folder: Path) -> None:
    """The loop's checkpoint, where there is one, is a file of the run's own, and none is there that Lightning would
    look for by itself (on Slurm). Raises UserError."""
    last = inside(folder, LAST)
    for place, is_right, kind in ((folder / FIT, os.path.isdir, "a folder"), (last, os.path.isfile, "a file")):
        if os.path.lexists(place) and not is_right(place):
            raise UserError(f"{place} is to be {kind} of the run's own, and is none: remove it.")
    if stray := next(folder.glob("*hpc_ckpt_*"), None):
        raise UserError(f"{stray} is none of a run's files, and Lightning would go on from it: remove it.")


def plain(text: str) -> str:
    """A text as a part of a file's name: letters, digits, "_", "." and "-", at most 80."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)[:80].strip(".-") or "unnamed"


UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A text as one line that a terminal only shows: control characters, which could move its cursor or name its
    window, marks that turn the direction of writing, and line breaks become \\xNN or \\uNNNN."""
    return UNSEEN.sub(
        lambda found: f"\\x{ord(found[0]):02x}" if found[0] < "\u0100" else f"\\u{ord(found[0]):04x}", text
    )
