"""Turns a composed config into plain, checked settings and the task that they describe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from realera import paths
from realera.contracts import Task, UserError
from realera.settings import error_sentences, loggers, resolvers, schema
from realera.settings.instantiate import build
from realera.settings.run_settings import Settings
from realera.tasks.files import read_concepts


def settings_of(command: str, words: Sequence[str], spelt: Callable[[str], str] = "'{}'".format) -> dict[str, Any]:
    """The checked settings of `python -m realera.<command> <words>`, for use inside another program: that program's
    Hydra state is restored. spelt: how an error sentence writes a setting that it suggests. Raises UserError for words
    that cannot be composed and for settings that are not valid."""
    with _hydra_restored():
        return _settings_of(command, words, spelt)


@contextmanager
def _hydra_restored() -> Iterator[None]:
    """Without Hydra's global state, which is restored at the end."""
    state, own = Singleton.get_state(), GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        Singleton.set_state(state)  # a copy of the global state of Hydra and OmegaConf
        GlobalHydra.instance().hydra = own


def _settings_of(command: str, words: Sequence[str], spelt: Callable[[str], str]) -> dict[str, Any]:
    resolvers.register_resolvers()
    try:
        with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
            cfg = hydra.compose(command, list(words))
            if cfg.get("judge") is None and "judges" in (cfg.get("task") or {}):
                chosen = resolvers.by_backbone(cfg.task.judges, _root_=cfg)
                cfg = hydra.compose(command, [*words, f"judge={chosen}"])
            return checked(with_concepts(cfg), command)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(error_sentences.of_config(error, command, list(words), spelt)) from error
    except (ValueError, TypeError) as error:
        if (sentence := error_sentences.of_option(error, words)) is None:
            raise
        raise UserError(sentence) from error


def of_another(command: str, words: Sequence[str]) -> DictConfig:
    """The config of another command, composed in a job of this one: yaml files in this command's --config-dir and
    hydra.searchpath are found too. Raises UserError for words that cannot be composed."""
    own = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else []
    found = [word for word in own if word.lstrip("+").startswith("hydra.searchpath=")]
    try:
        return hydra.compose(command, [*found, *words])
    except (HydraException, OmegaConfBaseException) as error:
        with _hydra_restored():  # the sentence is found by composing once more
            raise UserError(error_sentences.of_config(error, command, list(words))) from error


def word(key: str, value: Any) -> str:
    """A setting as a word of the command line: key=value, with the value in Hydra's grammar."""
    return f"{key}={_typed_value(value)}"


def plain_number(value: Any) -> Any:
    """A number of numpy or torch as one of Python; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _typed_value(value: Any) -> str:
    value = plain_number(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_typed_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_typed_value, value)) + "]"
    if isinstance(value, float) and math.isinf(value):
        return ".inf"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value).replace('"', '\\"')
    return f'"{text}"'


def in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def typed_words(config: Any) -> list[str]:
    """The words that were typed for the job or sweep of this config. Their interpolations are not resolved: that
    happens in the config that is composed from them."""
    typed = OmegaConf.to_container(config.overrides.task, resolve=False)
    assert isinstance(typed, list)
    return [str(word) for word in typed]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain dicts and lists, with all interpolations resolved. The text ".inf" in a method's settings
    becomes a number: in yaml .inf is a number, but Hydra's command line reads it as a text.

    Raises:
        UserError: an interpolation cannot be resolved, or a mandatory value (???) is missing.
    """
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(error_sentences.of_value(error)) from error
    assert isinstance(container, dict)
    return {str(key): _infinite(value) if key == "method" else value for key, value in container.items()}


def _infinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _infinite(one) for key, one in value.items()}
    return math.inf if value == ".inf" else value


def checked(cfg: DictConfig, command: str) -> dict[str, Any]:
    """`plain`, with the types and ranges of the command's settings checked (schema.py). Raises UserError."""
    try:
        config = plain(cfg)
    except UserError:  # perhaps due to a wrong setting, which has a clearer sentence
        schema.check_unresolved(OmegaConf.to_container(cfg, resolve=False), command)
        raise
    schema.check(config, command)
    loggers.check(config.get("logger"))
    return config


def check_hydra_words(words: Sequence[str]) -> None:
    """Raises UserError for a key that is added to Hydra's own settings (+hydra.KEY=...) and that Hydra does not have.
    Hydra itself refuses such a key only without the +."""
    for word in words:
        key = word.lstrip("+").partition("=")[0]
        if not (word.startswith("+") and key.startswith("hydra.")):
            continue
        group: Any = HydraConf
        for part in key.split(".")[1:]:
            if not dataclasses.is_dataclass(group):
                break  # a part with free names, such as hydra.job.env_set, or a launcher's own settings
            kinds = {field.name: field.type for field in dataclasses.fields(group)}
            if part not in kinds:
                raise UserError(f"there is no setting '{key}': Hydra does not read it; leave it out.")
            group = kinds[part]


def name_concepts(config: dict[str, Any], task: Task) -> dict[str, Any]:
    """The config with the task's names filled in: `concept` (and the guide's `concepts`) if none was typed, and the
    preserved concepts if method.edit.keep=task. Raises UserError if the task has no preserved concepts to name."""
    config = _name_preserved(config, task)
    settings = Settings(config)
    if settings.concept:
        return config
    named = {**config, "concept": [concept.target for concept in task.concepts]}
    method = settings.method
    if method.guide.awaits_concepts:
        named["method"] = {**method.node, "guide": {**method.guide.node, "concepts": named["concept"]}}
    return named


def _name_preserved(config: dict[str, Any], task: Task) -> dict[str, Any]:
    method = Settings(config).method
    if method.edit.keep != "task":
        return config
    if not (told := list(getattr(task, "told", ()))):
        raise UserError(
            f"method.edit.keep=task, but task {task.name} tells the method none of its preserved concepts: type "
            "task.told=half (it tells every second one and judges the others), or name concepts in method.edit.keep."
        )
    return {**config, "method": {**method.node, "edit": {**method.edit.node, "keep": told}}}


def prepared(cfg: DictConfig, command: str) -> DictConfig:
    """The config that a command's step takes: checked, with the task's judge and the concepts of concepts_file. Raises
    UserError."""
    loggers.check_choice(typed_words(HydraConfig.get()), cfg.get("logger"))
    checked(cfg, command)
    judged = with_judge(cfg)
    if judged is not cfg:
        checked(judged, command)
    return with_concepts(judged)


def with_judge(cfg: DictConfig) -> DictConfig:
    """The config with the judge that the task names for this backbone (`judges` in its yaml), unless a judge was typed.
    It is composed again with the same --config-name and hydra.searchpath."""
    hydra_config = HydraConfig.get()
    typed = typed_words(hydra_config)
    open_choice = "judge" in hydra_config.runtime.choices and hydra_config.runtime.choices["judge"] is None
    if not open_choice or "judges" not in (cfg.get("task") or {}) or any(w.startswith("judge=") for w in typed):
        return cfg
    found = [word for word in hydra_config.overrides.hydra if word.lstrip("+").startswith("hydra.searchpath=")]
    judge = f"judge={resolvers.by_backbone(cfg.task.judges, _root_=cfg)}"
    return hydra.compose(hydra_config.job.config_name, [*found, *typed, judge])


def with_concepts(cfg: DictConfig) -> DictConfig:
    """The config with the names and anchors of `concepts_file` as `concept` and `anchor`. Names that are numbers become
    texts, as they are saved in a run folder.

    Raises:
        UserError: the file cannot be read, or concepts or anchors are given twice.
    """
    for key in ("concept", "anchor"):
        if has_numbers(given := cfg.get(key)):
            texts = [None if name is None else str(name) for name in (given if OmegaConf.is_list(given) else [given])]
            cfg[key] = texts if OmegaConf.is_list(given) else texts[0]
    file, anchor = cfg.get("concepts_file"), cfg.get("anchor")
    if file is None:
        return cfg
    if cfg.concept is not None:
        raise UserError("concept and concepts_file are both given: leave one of them out.")
    names, anchors = zip(*read_concepts(file))
    if OmegaConf.is_list(anchor) and any(anchors):
        raise UserError(f"anchor is a list and {file} contains anchors too: leave one of them out.")
    if not OmegaConf.is_list(anchor):
        listed = [own or anchor for own in anchors]  # a typed anchor is for the names that have none in the file
        cfg.anchor = listed if any(listed) and len(listed) > 1 else listed[0]
    cfg.concept = list(names) if len(names) > 1 else names[0]
    cfg.concepts_file = None
    return cfg


def has_numbers(names: Any) -> bool:
    """Whether a name, or one of several, is a number, as in concept=1984."""
    return any(isinstance(name, int) for name in ([names] if isinstance(names, str | int | None) else names))


def build_task(config: Mapping[str, Any]) -> Task:
    """The task of a resolved config. Tasks are built without torch, so that their errors come early."""
    task: Task = build(Settings(config).task.to_build)
    return task
