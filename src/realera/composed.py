"""A composed config as plain, checked settings."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from realera import complaints, schema
from realera.contracts import UserError


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain containers, every interpolation resolved; .inf in a method's settings is a number, however
    it came here: yaml spells it so, and Hydra's command line takes that for a word.

    Raises:
        UserError: an interpolation that cannot be resolved, or a mandatory value (???) that was not given.
    """
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(complaints.of_value(error)) from error
    assert isinstance(container, dict)
    return {str(key): _infinite(value) if key == "method" else value for key, value in container.items()}


def _infinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _infinite(one) for key, one in value.items()}
    return math.inf if value == ".inf" else value


def checked(cfg: DictConfig, door: str) -> dict[str, Any]:
    """`plain`, after the settings of a command were held against their types and ranges (schema.py)."""
    try:
        config = plain(cfg)
    except UserError:  # it may come from a setting that can be told by itself
        schema.check_unresolved(OmegaConf.to_container(cfg, resolve=False), door)
        raise
    schema.check(config, door)
    return config
