"""Options of conf/ as data, where composing a whole door would be slow."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from realera import schema
from realera.paths import CONF_DIR


def method_settings(name: str) -> Any:
    """conf/method/<name>.yaml over those that its defaults list names, unresolved."""
    return deepcopy(_read(name))


@cache
def _read(name: str) -> Any:
    node = OmegaConf.load(CONF_DIR / "method" / f"{name}.yaml")
    below = [base for base in node.pop("defaults", []) if base != "_self_"]
    return OmegaConf.merge(*(_read(base) for base in below), node)


def built(part: Any, call: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """A part as a run builds it: its settings are held against their types and ranges, then given to the constructor
    (or to `call`, which fills in others)."""
    plain = {key: value for key, value in settings.items() if not hasattr(value, "__dict__")}  # the others are parts
    target = f"{part.__module__}.{part.__qualname__}"
    schema.check_part({"_target_": target, "_partial_": True, **plain}, "part")
    return (call or part)(**settings)
