"""Builds objects from plain settings: the class or function of a mapping's "_target_" (module.name) is called with the
mapping's other entries.

Nothing is interpolated: a text that contains "${" is a text. This module imports only the standard library, because
judge.python's interpreter reads it too. Settings from a file must be checked before (trust.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pkgutil import resolve_name
from typing import Any

from realera.contracts import UserError

WORDS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")  # Hydra's; _convert_ is always "all" here


class NotBuilt(Exception):
    """A part could not be built; `__cause__` is the error. place: the part's dotted key, "" for the outermost part."""

    def __init__(self, target: str, place: str, cause: Exception) -> None:
        super().__init__(f"{target}: {type(cause).__name__}: {cause}")
        self.place = place


def build(node: Any, *, classes: bool = False, at: str = "", **more: Any) -> Any:
    """The object that settings describe; nested parts are built first. classes: allow only classes, and none of the
    standard library. more: further keywords for the outermost part.

    Raises:
        UserError: a part raised it, or a target is not allowed.
        NotBuilt: a part raised another exception, or a target cannot be imported.
    """
    if isinstance(node, (list, tuple)):
        return [build(value, classes=classes, at=f"{at}[{i}]") for i, value in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    nested = node.get("_recursive_", True)
    values = {
        key: build(value, classes=classes, at=f"{at}.{key}" if at else str(key)) if nested else value
        for key, value in node.items()
        if key not in WORDS
    }
    if node.get("_target_") is None:
        return values
    target = str(node["_target_"])
    try:
        made = locate(target, classes)
        given = build(list(node.get("_args_") or ()), classes=classes, at=at)
        called = partial(made, *given, **{**values, **more})
        return called if node.get("_partial_") else called()
    except (UserError, NotBuilt):
        raise
    except Exception as error:
        raise NotBuilt(target, at, error) from error


def locate(target: str, classes: bool = False) -> Any:
    """The class or function of a dotted name. Raises ImportError, UserError."""
    refused = UserError(f"_target_={target[:200]} is not allowed: give a class of realera or a class of your own.")
    if classes and target.partition(".")[0] in (*sys.stdlib_module_names, "builtins"):
        raise refused
    try:
        found = resolve_name(target)
    except (AttributeError, ValueError) as error:
        raise ImportError(f"there is no {target}") from error
    if classes and not isinstance(found, type):
        raise refused
    return found
