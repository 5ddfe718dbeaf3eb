"""Every leaf of every yaml under conf/, and what one may mistype in its place."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import realera
from realera.paths import CONF_DIR
from realera.settings import composition, resolvers

ODD: tuple[Any, ...] = (None, True, "abc", -1, 0, 1e308, math.nan, math.inf, 1e20, 5, 2**63 - 1, [], [5], {"a": 1}, "")
GROUPS = ("task", "method", "backbone", "judge", "trainer", "logger", "attack")
NEEDED = {
    "train": ["concept=airplane", "anchor=sky", "backbone=mini"],
    "evaluate": ["run=original", "concept=airplane", "anchor=sky", "backbone=mini"],
    "generate": ["run=x", "prompts=[y]"],
    "export": ["run=x", "to=map", "out=z"],
    "apply": ["map=x", "pretrained=mini", "out=z"],
    "residue": ["run=x"],
    "attack": ["run=original", "concept=airplane", "anchor=sky", "backbone=mini"],
    "cache": [f"captions={__file__}", "backbone=mini"],
}
DOORS = realera.COMMANDS
Place = tuple[str | int, ...]


def own_yaml(file: Path) -> dict[str, Any]:
    """What a yaml sets itself, unresolved, without its defaults list and Hydra's part."""
    node = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items() if key not in ("defaults", "hydra")}


def leaves(node: Any, at: Place = ()) -> Iterator[Place]:
    """The places of all values that hold no others; of a list with entries, the first one's too."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*at, key))
        return
    if at:
        yield at
    if isinstance(node, list) and node:
        yield from leaves(node[0], (*at, 0))


def groups_of(node: Any, at: Place = ()) -> Iterator[Place]:
    """The places of all values that hold others."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, dict) and value:
            yield (*at, key)
            yield from groups_of(value, (*at, key))


def with_value(config: dict[str, Any], at: Place, value: Any) -> dict[str, Any]:
    """The config with another value in one place; it shares the rest."""
    made = copy.copy(config)
    node: Any = made
    for key in at[:-1]:
        node[key] = copy.copy(node[key])
        node = node[key]
    node[at[-1]] = copy.deepcopy(value)
    return made


def composed(door: str, *words: str) -> Any:
    """A command's settings as composed, unresolved."""
    resolvers.register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(door, [*NEEDED.get(door, []), *words])


def options() -> list[tuple[str, str]]:
    """Every (group, option) of the groups, of the groups in them ("method/neighbours"), and the experiments."""
    groups = [group for name in GROUPS for group in (name, *inner(name))]
    return [
        (group, file.stem) for group in (*groups, "experiment") for file in sorted((CONF_DIR / group).glob("*.yaml"))
    ]


def inner(group: str) -> list[str]:
    """The groups within a group, whose options are a part of its options."""
    return [f"{group}/{folder.name}" for folder in sorted((CONF_DIR / group).iterdir()) if folder.is_dir()]


@cache
def walked(group: str, option: str) -> tuple[str, dict[str, Any], list[Place]]:
    """(door, resolved settings, leaves) of one yaml: of a command's ("" for a group) or of a group's option. To be
    looked at only."""
    if not group:
        resolved = composition.plain(composed(option))
        own = own_yaml(CONF_DIR / f"{option}.yaml")
        return option, resolved, [place for key in own for place in leaves(resolved[key], (key,))]
    door = "attack" if group == "attack" else "train"
    resolved = composition.plain(composed(door, f"{group}={option}"))
    own = own_yaml(CONF_DIR / group / f"{option}.yaml")
    if group == "experiment":
        return "train", resolved, [place for place in leaves(own) if _there(resolved, place)]
    at = tuple(group.split("/"))
    node: Any = resolved
    for name in at:
        node = node[name]
    return door, resolved, list(leaves(_shape(own, node), at))


def _shape(own: Any, resolved: Any) -> Any:
    """What a yaml sets, with its interpolations resolved."""
    if isinstance(own, dict) and isinstance(resolved, dict):
        return {key: _shape(value, resolved[key]) for key, value in own.items() if key in resolved}
    return resolved


def _there(config: Any, place: Place) -> bool:
    for key in place:
        if isinstance(config, dict) and key not in config:
            return False
        config = config[key]
    return True
