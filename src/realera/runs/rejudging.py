"""Finds the run that evaluate judges, or that attack attacks: an existing run, or a run of the unedited model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from realera.contracts import UserError
from realera.runs import folders, preflight, starting, trust
from realera.runs.folders import Run
from realera.settings import composition
from realera.settings.run_settings import ORIGINAL, Settings

OF_ATTACK = ("attack", "limit", "split", "attack_seed")  # settings of realera.attack that are not the run's
NO_RUN = "original"  # in place of a run's name: the unedited model
OF_THE_RUN = ("task", "backbone", "concept", "concepts_file", "anchor", "seed", "root", "run_dir", "images_at_once")


def run_of(config: Mapping[str, Any]) -> tuple[Run, bool]:
    """The run that evaluate's resolved config names, and whether it is a run of the unedited model, whose folder may
    not exist yet.

    Raises:
        UserError: there is no such run, or a setting was typed that is fixed by the run.
    """
    original = config["run"] == NO_RUN
    rest = {key: value for key, value in config.items() if key not in ("run", "dry_run")}
    return (_unedited(rest) if original else _existing(str(config["run"]), rest.get("judge"))), original


def to_attack(cfg: DictConfig) -> tuple[dict[str, Any], Run, bool]:
    """The settings of realera.attack, the run that it attacks, and whether this is a run of the unedited model, whose
    folder may not exist yet. Raises UserError as `run_of`."""
    config = composition.plain(_with_settings_of_run(cfg))
    run, original = run_of({key: value for key, value in config.items() if key not in OF_ATTACK})
    return config, run, original or run.settings.unedited


def _with_settings_of_run(cfg: DictConfig) -> DictConfig:
    """The config with the task and the backbone of the run, on which the attack's own defaults depend. Raises UserError
    if there is no such run."""
    if cfg.run == NO_RUN:
        return cfg
    run = folders.open_run(str(cfg.run))
    with open_dict(cfg):
        for group in ("task", "backbone"):
            cfg[group] = OmegaConf.create(dict(getattr(run.settings, group).node))
    return cfg


def by_its_own(run: Run) -> bool:
    """Whether the judge of an existing run is that of its own settings."""
    own = Settings(folders.read_config(run.folder)).judge
    return not own or own == run.settings.judge


def _unedited(config: dict[str, Any]) -> Run:
    """The run of the unedited model for this task and backbone."""
    preflight.check_settings(config)
    config, _ = starting.named(config)
    config = {**config, "method": {"name": ORIGINAL}, "evaluate": True}
    return Run(folders.folder_of(config), config)


def _existing(name: str, judge: Any) -> Run:
    """An existing run, with the typed judge or its own."""
    typed = {word.partition("=")[0].lstrip("+") for word in composition.typed_words(HydraConfig.get())}
    if clash := sorted(typed & set(OF_THE_RUN)):
        raise UserError(f"{clash[0]} is fixed by the run {name}: leave it out, or give run=original.")
    run = folders.open_run(name)
    by_another = judge is not None and "judge" in typed
    trust.check_tables(run.config, run.folder)
    if not by_another and (python := trust.interpreter(run.settings.judge.node)):
        raise UserError(
            f"{name} was judged in another Python interpreter, and a run folder may not choose which program is "
            f"started: type it, judge=NAME judge.python={python}."
        )
    if not by_another and (model := trust.foreign_model(run.settings.judge.node)):
        raise UserError(
            f"{name} was judged by a model that is not one of the library's ({model[:120]!r}), and a run folder may "
            "not choose such a model: type it, judge=NAME judge.model=MODEL."
        )
    return Run(run.folder, {**run.config, "judge": judge}) if by_another or not run.settings.judge else run
