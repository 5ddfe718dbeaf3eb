"""Options of conf/ as data, where composing a whole door would be slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from realera.paths import CONF_DIR
from realera.settings import schema
from realera.settings.constructors import signature
from realera.settings.source_code import Class, find
from realera.settings.values import Look


def method_settings(name: str) -> Any:
    """conf/method/<name>.yaml over those that its defaults list names, unresolved."""
    return deepcopy(_read(name))


def part_settings(part: str, name: str) -> Any:
    """conf/method/<part>/<name>.yaml, unresolved."""
    return OmegaConf.load(CONF_DIR / "method" / part / f"{name}.yaml")


@cache
def _read(name: str) -> Any:
    node: Any = OmegaConf.load(CONF_DIR / "method" / f"{name}.yaml")
    below: list[Any] = []
    for entry in node.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            below.append(_read(entry))
        elif not isinstance(entry, str):  # a part chosen from a group of its own
            below += [{part: part_settings(part, chosen)} for part, chosen in entry.items() if chosen]
    return OmegaConf.merge(*below, node)


def check_part(node: Mapping[str, Any], at: str) -> None:
    """Holds one node with a _target_ against its types and ranges; `at` is its dotted name."""
    schema.Part().check(node, at, Look())


def check_method(node: Any) -> None:
    """Holds a method's own settings, resolved, against their types and ranges."""
    train = find(f"{schema.SETTINGS}.Train")
    taken = signature(train) if isinstance(train, Class) else None
    assert taken is not None
    schema.kind_of(taken.parameters["method"]).check(node, "method", Look())


def built(part: Any, call: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """A part as a run builds it: its settings are held against their types and ranges, then given to the constructor
    (or to `call`, which fills in others)."""
    plain = {key: value for key, value in settings.items() if not hasattr(value, "__dict__")}  # the others are parts
    target = f"{part.__module__}.{part.__qualname__}"
    check_part({"_target_": target, "_partial_": True, **plain}, "part")
    return (call or part)(**settings)
