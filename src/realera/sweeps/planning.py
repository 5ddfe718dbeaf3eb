"""Hydra's callback at the start of a sweep: composes every job, prints the plan, and ends there if that was all."""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from realera import console, paths
from realera.contracts import UserError
from realera.runs import estimate, folders, preflight, rejudging, starting
from realera.runs.estimate import Plan, Work
from realera.settings import composition, error_sentences, schema
from realera.settings.instantiate import NotBuilt
from realera.sweeps import jobs as sweep
from realera.sweeps import study
from realera.system import disk

MANY = 20  # jobs from which on composing them shows a bar
Made = dict[Path, set[tuple[str, str]]]  # run folders, and digests of the settings and of the judge of who makes them
ONE_FOLDER = (
    "run_dir={folder} is the folder of several jobs of other settings: leave it out, or let it name what varies, as "
    "run_dir='{folder}/${{seed}}' does of seeds."
)


class Beginning(Callback):
    """Prints the plan of a sweep and keeps it as plan.json; with dry_run=true that is the end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        dry = bool(config.get("dry_run"))
        try:
            refuse_missing(config)
            sweeper: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
            schema.check_search({str(key): value for key, value in sweeper.items() if not _interpolated(value)})
            refuse_moving(config)
            planned = plan_of(config, str(kwargs.get("config_name") or config.hydra.job.config_name))
            study.settle(config)
            if not dry:
                make_room()
                make_room_for_trials(str(config.hydra.sweeper.get("storage") or ""))
            estimate.show(planned, None if dry else sweep.folder())
        except Exception as error:  # Hydra would make a warning of it, and go on: SystemExit passes
            if (sentence := error_sentences.of_step(error)) is not None:
                sweep.fail(sentence)
            traceback.print_exc()
            sys.exit(1)
        if dry:
            sys.exit(2 if planned.refused else 0)


def refuse_missing(config: DictConfig) -> None:
    """A launcher and a sweeper must be there, and one that is an extra must be installed."""
    for part in ("launcher", "sweeper"):
        if not isinstance(node := config.hydra[part], DictConfig):
            raise UserError(f"hydra.{part}={node}: its settings are {{name: value}}; hydra/{part}=NAME chooses one.")
        module = str(node.get("_target_") or "").rpartition(".")[0]
        top = ".".join(module.split(".")[:2])
        if top.startswith("hydra_plugins.") and (find_spec("hydra_plugins") is None or find_spec(top) is None):
            raise UserError(f"{top.removeprefix('hydra_plugins.')} is not installed: pip install 'realera[sweeps]'.")


def _interpolated(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def refuse_moving(config: DictConfig) -> None:
    """Runs, ledger and cache of a sweep's jobs stand where the sweep was started."""
    if config.hydra.job.chdir:
        raise UserError(
            "hydra.job.chdir=true would put each job's files where no other job, nor the sweep's page, finds them: "
            "leave it out."
        )


def make_room() -> None:
    """The sweep's folder must be there before its first job."""
    place = sweep.folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{place}, where a sweep keeps its list of runs and its page, cannot be made ({error.strerror or error}): "
            "give the command in a folder that you may write to; root=FOLDER moves the runs alone."
        ) from error
    folders.check_sweep(place)


def make_room_for_trials(storage: str) -> None:
    """Of a search's storage the file is made when the first trial is kept, its folder is not."""
    if storage.startswith("sqlite:///"):
        file = Path(storage.removeprefix("sqlite:///"))
        with disk.explained(file):
            file.parent.mkdir(parents=True, exist_ok=True)


def plan_of(config: DictConfig, config_name: str) -> Plan:
    """The plan of a sweep's config as Hydra has composed it, before any job.

    Raises:
        UserError: a job's config cannot be composed, or of a search its one example cannot run.
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
    if searched is not None and str(config.hydra.sweeper._target_).endswith(BasicSweeper.__name__):
        raise UserError(f"{searched.input_line} is a range to search in: add hydra/sweeper=search, or list its values.")
    if trials is not None or searched is not None:
        one_of_them = _composed(compose, fixed, config_name)
        if one_of_them.get("run_dir") and not OmegaConf.is_interpolation(one_of_them, "run_dir"):
            raise UserError(ONE_FOLDER.format(folder=one_of_them.run_dir))
        return _several(work_of(one_of_them), int(trials or 1))
    jobs = BasicSweeper.split_arguments(parsed, None)[0]
    if not jobs:
        empty = [one for one in parsed if one.is_sweep_override() and not list(one.sweep_string_iterator())]
        raise UserError(f"there is no job to do: {empty[0].input_line} has no value.")
    found: list[Work | str] = []
    known: dict[str, Any] = {}
    made: Made = {}
    with console.bar("planning", len(jobs)) if len(jobs) >= MANY else console.no_bar() as advance:
        for job in jobs:
            cfg = _composed(compose, job, config_name)
            if lost := sorted(sweep.axes(cfg.hydra) - sweep.axes(config.hydra)):
                raise UserError(
                    f"'{' '.join(word for word in job if word not in fixed)}' would vary {', '.join(lost)} by itself, "
                    "which Hydra does only where all jobs have it in common: give a command for each."
                )
            try:
                found.append(work_of(cfg, known, made))
            except (UserError, NotBuilt) as error:  # of this job alone, which will say it itself
                found.append(error_sentences.of_step(error) or error_sentences.first_line(error))
            advance(1)
    refuse_shared(made)
    return estimate.count(found)


def refuse_shared(made: Made) -> None:
    """No job may clear what another of the sweep has made."""
    for folder, content in made.items():
        if len({settings for settings, _ in content}) > 1:
            raise UserError(ONE_FOLDER.format(folder=folder))
        if len(content) > 1:
            raise UserError(
                f"several jobs would judge {folder} by turns, and the last one's numbers stay: leave judge= out, and "
                f"then put others' beside its own with python -m realera.evaluate -m run={folder} judge=A,B."
            )


def _composed(compose: Composer, words: Sequence[str], config_name: str) -> DictConfig:
    """A job's config; Hydra begins no job where one of them has none, and neither do we."""
    try:
        return compose(words)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        GlobalHydra.instance().clear()  # the answer looks for what there is by composing once more
        raise UserError(error_sentences.of_config(error, config_name, list(words))) from error


def _several(one: Work, trials: int) -> Plan:
    """A search: what every trial draws is known, its settings are not."""
    each = estimate.summed([one] * trials)
    return Plan(**{**vars(each), "basis": f"{each.basis}; {trials} trials, each as the settings stand, at most"})


def work_of(cfg: DictConfig, known: dict[str, Any] | None = None, made: Made | None = None) -> Work:
    """What a composed job has to do. made: is told of the run that it makes."""
    hydra_config = HydraConfig.instance()
    outside = hydra_config.cfg
    hydra_config.set_config(cfg)  # as in the job: its own choices say which judge is its task's
    try:
        own = copy.copy(cfg)
        with open_dict(own):
            del own["hydra"]
        config = composition.checked(own, "evaluate" if "run" in own else "train")
        if config["concepts_file"] is not None or any(
            composition.has_numbers(config[key]) for key in ("concept", "anchor")
        ):
            config = composition.plain(composition.with_concepts(own))
        preflight.check_sweep(config.get("trainer") or {})
        if config.get("run") is not None:
            run, unedited = rejudging.run_of(config)
            return estimate.judging(run, composition.build_task(run.config), unedited, known)
        preflight.check_settings(config, here=False)
        task = composition.build_task(config)
        config = composition.name_concepts(config, task)
        folder = folders.folder_of(config)
        starting.check(config, _seen(known))
        if (folder / paths.METRICS).is_file():  # finished only if judged by this judge: slow to compose
            config["judge"] = composition.plain(composition.with_judge(own)).get("judge")
        if made is not None:
            content = folders.digest(folders.identity(config)), folders.digest(config.get("judge"))
            made.setdefault(folder, set()).add(content)
    finally:
        hydra_config.cfg = outside
    return estimate.work(config, task, known=known)


def _seen(known: dict[str, Any] | None) -> set[str]:
    """What was looked at for other jobs of the same plan."""
    seen: set[str] = (known if known is not None else {}).setdefault("looked at", set())
    return seen


class Composer:
    """Composes jobs as their launcher will; jobs of the same options share the slow part."""

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
        except OmegaConfBaseException:  # in the launcher's words
            return self.loader.load_sweep_config(self.config, list(words))
        with open_dict(cfg):
            cfg.hydra.overrides.task = list(words)
        return cfg
