"""Checks of what is given to the Python interface. Each raises UserError that names the argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from realera import setting_types
from realera.contracts import UserError
from realera.setting_types import Guidance, SamplerSteps, Seed
from realera.settings import composition

# Settings of the command that have no meaning for a pipeline in memory, and the call to use instead.
ELSEWHERE: Mapping[str, str] = {
    "run_dir": "call erased.save(folder)",
    "root": "call erased.save(folder)",
    "overwrite": "call erased.save(folder) with a new folder",
    "evaluate": "call realera.evaluate(erased)",
    "logger": "track the numbers of realera.evaluate(erased) yourself",
    "dry_run": "type the command with dry_run=true",
}


def names(given: Any, what: str) -> Any:
    """One name as a str, several as a list of str. None stays None, also inside a list. A number is a name too."""
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return [_name(one, what) for one in given]
    return _name(given, what)


def _name(given: Any, what: str) -> str | None:
    if given is None or (isinstance(given, str | int | float) and not isinstance(given, bool)):
        return None if given is None else str(given)
    raise UserError(f"{what}={_shown(given)} is not a name: give a text, or a list of texts.")


def words(overrides: Any, settings: Mapping[str, Any]) -> list[str]:
    """The settings, then the overrides, as words of the command line."""
    if isinstance(overrides, str | bytes) or not isinstance(overrides, Sequence):
        raise UserError(f'overrides={_shown(overrides)} is not a list: give a list of texts, such as ["edit.ridge=1"].')
    for one in overrides:
        if not isinstance(one, str):
            raise UserError(f'overrides has {_shown(one)}, which is not a text: give key=value, such as "seed=1".')
    if "" in settings:
        raise UserError('a setting has an empty name: give its key, as in **{"edit.ridge": 1}.')
    found = [*(composition.word(key, value) for key, value in settings.items()), *overrides]
    for key in (one.lstrip("+~").partition("=")[0] for one in found):
        if key in ("backbone", "backbone.pretrained"):
            raise UserError(f"{key} is fixed by the pipeline: leave it out, or give another pipeline.")
        if (top := key.partition(".")[0]) in ELSEWHERE:
            raise UserError(f"{key} is a setting of the command: leave it out here, and {ELSEWHERE[top]}.")
    return found


def path(given: Any, name: str) -> Path:
    """A path that can exist, with ~ replaced."""
    if wrong := setting_types.PathText().fault(given):
        raise UserError(f"{name}={_shown(given)} {wrong}: give a path.")
    return Path(given).expanduser()


def folder(given: Any, name: str) -> Path:
    """A folder that exists or can be made. Raises UserError for a file."""
    place = path(given, name)
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is a file: give a folder as {name}.")
    return place


def new_folder(given: Any, name: str) -> Path:
    """A folder without files. Raises UserError for any other."""
    place = folder(given, name)
    if place.exists() and any(place.iterdir()):
        raise UserError(f"{place} already has files in it: give a new or an empty folder.")
    return place


def prompts(given: Any) -> list[str]:
    found = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
    for one in found:
        if wrong := setting_types.Text().fault(one):
            raise UserError(f"prompts={_shown(one)} {wrong}: give a text, or a list of texts.")
    return found


def seeds(given: Any, count: int) -> list[int]:
    """One seed for each of `count` prompts; a single seed is used for all of them."""
    given = given.tolist() if hasattr(given, "tolist") else given  # of numpy and torch
    each = list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given] * count
    return [number(one, "seeds", Seed) for one in each]


def steps(given: Any) -> int:
    found: int = number(given, "steps", SamplerSteps)
    return found


def guidance_scale(given: Any) -> float:
    found: float = number(given, "guidance_scale", Guidance)
    return found


def number(given: Any, name: str, kind: Any) -> Any:
    """kind: a type of `setting_types`."""
    given = composition.plain_number(given)
    (limits,) = get_args(kind)[1:]
    if wrong := limits.fault(given):
        raise UserError(f"{name}={_shown(given)} {wrong}: give {limits.words}.")
    return given


def _shown(given: Any) -> str:
    """The value in a sentence, on one line and not too long."""
    text = ascii(given)
    return text if len(text) <= 80 else f"{text[:80]}..."
