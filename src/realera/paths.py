"""Paths: the config folder, the shipped data, the cache, and the file names of a run and a sweep.

Standard library only: the commands import this module before anything heavy.
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
MINIATURE_DIT = HERE / "miniature" / "weights_dit"  # a transformer of the same world, without the parts above

# The files of a run folder.
CONFIG = "config.yaml"
ERASED = "erased.safetensors"
MAP = "map.safetensors"
NEIGHBOURS = "neighbours.safetensors"
MANIFEST = "manifest.jsonl"
VERDICTS = "verdicts"  # a folder with one <judge>.jsonl for each judge
METRICS = "metrics.json"
REPORT = "report.html"
IMAGES = "images"
ORIGINALS = "originals"  # the unedited model's images of the same prompts, linked from the cache
FIT = "fit"  # checkpoints of the training loop; deleted when it ends
LAST_CHECKPOINT = f"{FIT}/last.ckpt"
LOSSES = "losses.jsonl"  # one line for each logged step: {"step": int, "<term>": float, ...}
COSTS = "costs.json"  # wall time by stage, denoiser passes, parameters, peak memory
WANDB_ID = "wandb_id.txt"  # the id of this run in W&B
MLFLOW_ID = "mlflow_id.txt"  # and in MLflow
TRACKED = ("wandb", "tensorboard", "csv")  # folders of trackers in a run folder
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
)  # image formats that are read: pillow's others start programs (EPS) or are obsolete
ATTACKS = "attacks"  # a folder with <name>.jsonl, <name>.json and <name>/ for each attack: see evaluation/attacked.py
RESIDUE, RESIDUE_PAGE = "residue.json", "residue.html"  # which texts generate the concept, before and after
GENERATED_PAGE = "generated.html"  # the images of `generate`, before and after
EDIT_INFO = "edit.json"  # measurements of the edit: condition number, change of each layer, spectrum, prompt shifts
APPLIED = "realera_applied.json"  # in a diffusers folder: the maps that realera.apply applied to its U-Net
LOCK = ".lock"  # held by the process that makes the run; deleted when it ends
FIT_FILES = (MAP, NEIGHBOURS, EDIT_INFO, LOSSES)  # the fit's other files; erased.safetensors has their digests

# The files of a sweep.
SWEEPS = "sweeps"  # the folder of all sweeps, inside the folder of the runs
RUN_LIST = "runs.txt"  # the run folders of a sweep, one on each line
CELLS = "cells.jsonl"  # the outcome of each job: see `sweeps.jobs`
PLAN = "plan.json"
FAILED = "failed"  # tracebacks
TABLES, FIGURES = "tables", "figures"  # in the same folder as the page
RESULTS, README = "results.json", "README.md"  # in the folder of results=FOLDER
SWEEP_FILES = (RUN_LIST, CELLS, PLAN, FAILED, REPORT, TABLES, FIGURES, RESULTS, "multirun.yaml")  # the last is Hydra's


_cache: ContextVar[Path | None] = ContextVar("cache", default=None)


@contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    """Inside this context, `folder` is the cache."""
    token = _cache.set(folder)
    try:
        yield
    finally:
        _cache.reset(token)


def cache_dir() -> Path:
    """The folder of `cache_at`, else $REALERA_CACHE, else $XDG_CACHE_HOME/realera, else ~/.cache/realera. It is not
    created here."""
    if (chosen := _cache.get()) is not None:
        return chosen
    if given := os.environ.get("REALERA_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "realera"


def file_of(text: Any) -> Path | None:
    """The existing file of a path that a user typed, with "~" expanded, else None. None also for a path that is too
    long or names the home of an unknown user."""
    return _existing(text, Path.is_file)


def dir_of(text: Any) -> Path | None:
    """As `file_of`, for a folder."""
    return _existing(text, Path.is_dir)


def _existing(text: Any, test: Callable[[Path], bool]) -> Path | None:
    try:
        place = Path(str(text)).expanduser()
        return place if test(place) else None
    except (OSError, ValueError, RuntimeError):
        return None


def inside(folder: Path, name: str | Path) -> Path:
    """folder/name, for a folder that may come from somebody else, or a name that is read from a file.

    The name must be relative, without "..", and no part of it below `folder` may be a symbolic link; `folder` itself
    may be one. The file need not exist. Raises UserError.
    """
    text = str(name)
    windows = PureWindowsPath(text)
    if not text or "\0" in text or windows.drive or windows.root or ".." in windows.parts:
        raise UserError(f"{folder} refers to the file {text[:200]!r}, which is not inside it: do not use this folder.")
    place = folder
    try:
        for part in PurePosixPath(text).parts:
            place = place / part
            if place.is_symlink():
                raise UserError(
                    f"{place} is a symbolic link, and a run's files must be in its own folder: replace the link by the "
                    "file itself (cp -L), or remove it."
                )
    except (OSError, ValueError):
        raise UserError(
            f"{folder} refers to the file {text[:200]!r}, which is not a valid file name: do not use this folder."
        ) from None
    return place


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuses symbolic links among the files and folders of these names: through a link, files outside of the folder
    would be read, written or deleted. Raises UserError."""
    for name in names:
        inside(folder, name)
    for logged in (folder / name for name in TRACKED):
        for entry in os.scandir(logged) if logged.is_dir() else ():  # W&B makes links to its latest files
            if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(os.path.realpath(logged)):
                raise UserError(f"{entry.path} is a symbolic link that leads out of the run's folder: remove it.")


def refuse_odd(folder: Path) -> None:
    """Refuses a training checkpoint that is not a regular file of the run, and any checkpoint that Lightning would find
    and load without being asked (on Slurm). Raises UserError."""
    last = inside(folder, LAST_CHECKPOINT)
    for place, is_right, kind in ((folder / FIT, os.path.isdir, "a folder"), (last, os.path.isfile, "a file")):
        if os.path.lexists(place) and not is_right(place):
            raise UserError(f"{place} must be {kind} inside the run's folder, and it is not: remove it.")
    if stray := next(folder.glob("*hpc_ckpt_*"), None):
        raise UserError(f"{stray} is not a file of this run, and Lightning would resume from it: remove it.")


def as_file_name(text: str) -> str:
    """The text as a part of a file name: letters, digits, "_", "." and "-", at most 80 characters."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)[:80].strip(".-") or "unnamed"


UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text as one line that is safe to print in a terminal. Control characters (which could move the cursor or
    rename the window), marks that change the writing direction, and line breaks become \\xNN or \\uNNNN."""
    return UNSEEN.sub(
        lambda found: f"\\x{ord(found[0]):02x}" if found[0] < "\u0100" else f"\\u{ord(found[0]):04x}", text
    )
