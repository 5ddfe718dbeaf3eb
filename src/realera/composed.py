"""A composed config as plain, checked settings."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from realera import complaints, schema
from realera.contracts import Task, UserError


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


def name_concepts(config: dict[str, Any], task: Task) -> dict[str, Any]:
    """The config with the names that the task chose: the concepts where none was typed, in the guide's node too, and
    those to keep where method.edit.keep=task. Raises UserError where the task has none to keep."""
    config = _name_kept(config, task)
    if config.get("concept"):
        return config
    named = {**config, "concept": [concept.target for concept in task.concepts]}
    method = config.get("method") or {}
    guide = method.get("guide") or {}
    if "concepts" in guide and guide["concepts"] is None:
        named["method"] = {**method, "guide": {**guide, "concepts": named["concept"]}}
    return named


def _name_kept(config: dict[str, Any], task: Task) -> dict[str, Any]:
    method = config.get("method") or {}
    edit = method.get("edit") or {}
    if edit.get("keep") != "task":
        return config
    if not (told := list(getattr(task, "told", ()))):
        raise UserError(
            f"method.edit.keep=task, but task {task.name} keeps no names back from its judged prompts: type "
            "task.told=half (every second one, where it has names to preserve), or name them in method.edit.keep."
        )
    return {**config, "method": {**method, "edit": {**edit, "keep": told}}}
