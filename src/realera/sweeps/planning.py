"""Hydra's callback at the start of a sweep: composes every job and prints the plan; dry_run=true ends there."""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from realera import console, paths
from realera.contracts import UserError
from realera.runs import asked_attacks, compatibility, estimate, folders, preflight, rejudging, starting
from realera.runs.estimate import Plan, Work
from realera.settings import composition, error_sentences, schema
from realera.settings.instantiate import NotBuilt
from realera.settings.run_settings import Settings
from realera.sweeps import jobs as sweep
from realera.sweeps import study
from realera.system import disk

EVERY_COMBINATION = "BasicSweeper"  # Hydra's sweeper; the others search
MANY = 20  # from this number of jobs on, planning shows a progress bar
Made = dict[Path, set[tuple[str, str]]]  # {run folder: {(digest of settings, digest of judge) of a job}}
ONE_FOLDER = (
    "run_dir={folder} is the folder of several jobs with different settings: leave it out, or put the varied setting "
    "into it, such as run_dir='{folder}/${{seed}}' for seeds."
)


class Beginning(Callback):
    """Prints the plan of a sweep and saves it as plan.json. dry_run=true: prints it and ends the command."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        dry = bool(config.get("dry_run"))
        try:
            refuse_missing(config)
            sweeper: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
            schema.check_search({str(key): value for key, value in sweeper.items() if not _interpolated(value)})
            refuse_chdir(config)
            planned = plan_of(config, str(kwargs.get("config_name") or config.hydra.job.config_name))
            study.set_study_name(config)
            if not dry:
                make_sweep_folder()
                make_study_folder(str(config.hydra.sweeper.get("storage") or ""))
            estimate.show(planned, None if dry else sweep.folder())
        except Exception as error:  # Hydra would turn it into a warning and continue; SystemExit ends the sweep
            if (sentence := error_sentences.of_step(error)) is not None:
                sweep.fail(sentence)
            traceback.print_exc()
            sys.exit(1)
        if dry:
            sys.exit(2 if planned.refused else 0)


def refuse_missing(config: DictConfig) -> None:
    """Refuses a launcher or sweeper that is null or not installed. Raises UserError."""
    for part in ("launcher", "sweeper"):
        if not isinstance(node := config.hydra[part], DictConfig):
            raise UserError(f"hydra.{part}={node} is not valid: choose a {part} with hydra/{part}=NAME.")
        module = str(node.get("_target_") or "").rpartition(".")[0]
        top = ".".join(module.split(".")[:2])
        if top.startswith("hydra_plugins.") and (find_spec("hydra_plugins") is None or find_spec(top) is None):
            raise UserError(f"{top.removeprefix('hydra_plugins.')} is not installed: pip install 'realera[sweeps]'.")


def _interpolated(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def refuse_chdir(config: DictConfig) -> None:
    """Refuses hydra.job.chdir: paths of runs, of the sweep and of the cache are relative to the folder in which the
    sweep was started. Raises UserError."""
    if config.hydra.job.chdir:
        raise UserError(
            "hydra.job.chdir=true would put each job's files into a folder where other jobs and the sweep's page "
            "cannot find them: leave it out."
        )


def make_sweep_folder() -> None:
    """Creates the sweep's folder. Raises UserError if that is impossible."""
    place = sweep.folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{place}, the folder for the sweep's list of runs and its page, cannot be made "
            f"({error.strerror or error}): give the command in a folder that you may write to; root=FOLDER moves only "
            "the run folders."
        ) from error
    folders.check_sweep(place)


def make_study_folder(storage: str) -> None:
    """Creates the folder of a search's SQLite storage. Optuna creates the file, but not its folder."""
    if storage.startswith("sqlite:///"):
        file = Path(storage.removeprefix("sqlite:///"))
        with disk.explained(file):
            file.parent.mkdir(parents=True, exist_ok=True)


def combinations(overrides: Sequence[Override]) -> list[tuple[str, ...]]:
    """The words of each job, in the order of Hydra's own sweeper: the last setting varies first."""
    words: dict[str, list[str]] = {}  # of a setting that is given twice the last word counts
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            words[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            words[key] = [f"{key}={override.get_value_element_as_str()}"]
    return list(product(*words.values()))


def plan_of(config: DictConfig, config_name: str) -> Plan:
    """The plan of a sweep, from the config that Hydra composed before any job.

    Raises:
        UserError: a job's config cannot be composed, or the trials of a search cannot run.
    """
    trials = config.hydra.sweeper.get("n_trials")
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}), resolve=True)
    assert isinstance(params, dict)
    words = [f"{key!s}={value}" for key, value in params.items()] + composition.typed_words(config.hydra)
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
    compose = Composer(config)
    fixed = [word for word, one in zip(words, parsed) if not one.is_sweep_override()]
    searched = next((one for one in parsed if one.is_sweep_override() and not one.is_discrete_sweep()), None)
    if searched is not None and str(config.hydra.sweeper._target_).endswith(EVERY_COMBINATION):
        raise UserError(f"{searched.input_line} is a range for a search: add hydra/sweeper=search, or list values.")
    if trials is not None or searched is not None:
        trial = _composed(compose, fixed, config_name)
        if trial.get("run_dir") and not OmegaConf.is_interpolation(trial, "run_dir"):
            raise UserError(ONE_FOLDER.format(folder=trial.run_dir))
        return _plan_of_trials(work_of(trial), int(trials or 1))
    jobs = combinations(parsed)
    if not jobs:
        empty = [one for one in parsed if one.is_sweep_override() and not list(one.sweep_string_iterator())]
        raise UserError(f"the sweep has no job, because {empty[0].input_line} has no value: give it one.")
    found: list[Work | str] = []
    known: dict[str, Any] = {}
    made: Made = {}
    with console.bar("planning", len(jobs)) if len(jobs) >= MANY else console.hidden_bar() as advance:
        for job in jobs:
            cfg = _composed(compose, job, config_name)
            if lost := sorted(sweep.axes(cfg.hydra) - sweep.axes(config.hydra)):
                raise UserError(
                    f"'{' '.join(word for word in job if word not in fixed)}' varies {', '.join(lost)} in its yaml, "
                    "which Hydra does only if all jobs share that yaml: give one command for each."
                )
            try:
                found.append(work_of(cfg, known, made))
            except (UserError, NotBuilt) as error:  # of this job only; the job will report it
                found.append(error_sentences.of_step(error) or error_sentences.first_line(error))
            advance(1)
    refuse_shared(made)
    refuse_same_attack(known.get("attacked", {}))
    return estimate.count(found)


def refuse_shared(made: Made) -> None:
    """Refuses jobs that would overwrite the files of another job of the sweep. Raises UserError."""
    for folder, content in made.items():
        if len({settings for settings, _ in content}) > 1:
            raise UserError(ONE_FOLDER.format(folder=folder))
        if len(content) > 1:
            raise UserError(
                f"several jobs would judge {folder}, and only the last one's numbers would remain: leave judge= out, "
                f"and add other judges' numbers with python -m realera.evaluate -m run={folder} judge=A,B."
            )


def refuse_same_attack(attacked: Mapping[tuple[Path, str], Collection[str]]) -> None:
    """Refuses attacks of one name on one run with different settings: each would replace the results of the last one.
    Raises UserError."""
    for (run, name), settings in attacked.items():
        if len(settings) > 1:
            raise UserError(
                f"several jobs would attack {run} with different settings under the name {name}, and only the results "
                "of the last one would remain: give each its own name, such as 'attack.name=LABEL-${attack.steps}'."
            )


def _composed(compose: Composer, words: Sequence[str], config_name: str) -> DictConfig:
    """A job's config. If one cannot be composed, no job is started, as in Hydra itself. Raises UserError."""
    try:
        return compose(words)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        GlobalHydra.instance().clear()  # of_config composes a config once more to list the known settings
        raise UserError(error_sentences.of_config(error, config_name, list(words))) from error


def _plan_of_trials(one: Work, trials: int) -> Plan:
    """The plan of a search, whose trials draw the same images but have settings that are not known yet."""
    total = estimate.summed([one] * trials)
    return Plan(**{**vars(total), "basis": f"{total.basis}; at most {trials} trials, each with the current settings"})


def work_of(cfg: DictConfig, known: dict[str, Any] | None = None, made: Made | None = None) -> Work:
    """The work of a composed job. The run that it makes is added to `made`."""
    hydra_config = HydraConfig.instance()
    outside = hydra_config.cfg
    hydra_config.set_config(cfg)  # as in the job: the task's judge depends on the job's own choices
    try:
        own = copy.copy(cfg)
        with open_dict(own):
            del own["hydra"]
        if "attack" in own:
            return _work_of_attack(own, known if known is not None else {})
        config = composition.checked(own, "evaluate" if "run" in own else "train")
        if config["concepts_file"] is not None or any(
            composition.has_numbers(config[key]) for key in ("concept", "anchor")
        ):
            config = composition.plain(composition.with_concepts(own))
        preflight.check_sweep(Settings(config).trainer)
        if config.get("run") is not None:
            run, unedited = rejudging.run_of(config)
            compatibility.check(preflight.model_folder(run.settings.backbone), run.config)
            return estimate.judging(run, composition.build_task(run.config), unedited, known)
        preflight.check_settings(config, here=False)
        config, task = starting.named(config)
        attacks = asked_attacks.of_training(config, (known if known is not None else {}).setdefault("attacks", {}))
        folder = folders.folder_of(config)
        hindrance = starting.check(config, _checked_before(known))
        if (folder / paths.METRICS).is_file():  # the run is finished only if this judge judged it; slow to compose
            config["judge"] = composition.plain(composition.with_judge(own)).get("judge")
        if made is not None:
            content = folders.digest(folders.identity(config)), folders.digest(config.get("judge"))
            made.setdefault(folder, set()).add(content)
    finally:
        hydra_config.cfg = outside
    return replace(estimate.work(config, task, known=known, attacks=attacks), hindrance=hindrance)


def _work_of_attack(cfg: DictConfig, known: dict[str, Any]) -> Work:
    """The work of a job of realera.attack. What it writes is added to known["attacked"]."""
    composition.checked(cfg, "attack")
    config, run, original = rejudging.to_attack(composition.with_concepts(cfg))
    preflight.check_sweep(Settings(config).trainer)
    if not original:
        preflight.check_run(run)
    seen, hindrance = _checked_before(known), None
    if (model := f"model {run.settings.backbone.pretrained}") not in seen:
        hindrance = preflight.check_model(run.settings.backbone, plan=True)
        seen.add(model)
    compatibility.check(preflight.model_folder(run.settings.backbone), run.config)
    task, asked = composition.build_task(run.config), asked_attacks.Asked.of(config)
    work = replace(estimate.attacking(run, task, asked), hindrance=hindrance)
    content = folders.digest([asked.told(task.concepts), config.get("judge")])
    planned = known.setdefault("attacked", {}).setdefault((run.folder, asked.settings.name), set())
    again = content in planned  # an attack that is typed twice is carried out once
    planned.add(content)
    return replace(work, finished=work.finished or again)


def _checked_before(known: dict[str, Any] | None) -> set[str]:
    """The models and parts that were checked for other jobs of the same plan."""
    seen: set[str] = (known if known is not None else {}).setdefault("looked at", set())
    return seen


class Composer:
    """Composes jobs as their launcher will. Jobs with the same options share the slow part."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.loader = GlobalHydra.instance().config_loader()
        self.parser = OverridesParser.create(config_loader=self.loader)
        self.options = cache(lambda group: bool(self.loader.get_group_options(group)))
        self.bases: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, words: Sequence[str]) -> DictConfig:
        parsed = self.parser.parse_overrides(list(words))
        values = [one for one in parsed if not self.options(one.key_or_group)]
        if any(one.is_delete() or one.is_add() or one.is_force_add() or one.package for one in parsed):
            return self.loader.load_sweep_config(self.config, list(words))
        groups = tuple(word for word, one in zip(words, parsed) if self.options(one.key_or_group))
        if groups not in self.bases:
            self.bases[groups] = self.loader.load_sweep_config(self.config, list(groups))
        cfg = copy.deepcopy(self.bases[groups])
        try:
            for one in values:
                OmegaConf.update(cfg, one.key_or_group, one.value(), merge=True)
        except OmegaConfBaseException:  # raises it again with the launcher's message
            return self.loader.load_sweep_config(self.config, list(words))
        with open_dict(cfg):
            cfg.hydra.overrides.task = list(words)
        return cfg
