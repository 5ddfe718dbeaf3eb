"""Options of conf/ as data, where composing a whole door would be slow."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from realera.paths import CONF_DIR


def method_settings(name: str) -> Any:
    """conf/method/<name>.yaml over those that its defaults list names, unresolved."""
    node = OmegaConf.load(CONF_DIR / "method" / f"{name}.yaml")
    below = [base for base in node.pop("defaults", []) if base != "_self_"]
    return OmegaConf.merge(*(method_settings(base) for base in below), node)
