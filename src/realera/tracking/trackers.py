"""The trackers of a run: made from its settings, told its results, and ended with it.

Each kind of Lightning logger has a `Tracker` (base.py); nothing else in realera knows which trackers a run has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from realera import paths
from realera.runs.folders import Run
from realera.runs.session import Session
from realera.settings import resolvers
from realera.settings.loggers import KINDS, SHARED, WANDB, Kind, dotted, kind, nodes
from realera.tracking import content
from realera.tracking.base import INTERRUPTED, Tracker
from realera.tracking.local_files import CsvFile, TensorBoardFiles
from realera.tracking.mlflow_runs import MlflowRun
from realera.tracking.wandb_runs import WandbRun

log = logging.getLogger("realera")

ADAPTERS: Mapping[Kind, type[Tracker]] = {
    WANDB: WandbRun,
    KINDS["TensorBoardLogger"]: TensorBoardFiles,
    KINDS["CSVLogger"]: CsvFile,
    KINDS["MLFlowLogger"]: MlflowRun,
}


def make(run: Run, logger: Mapping[str, Any] | None = None) -> list[Tracker]:
    """The trackers of a run's `logger` settings, or of `logger` if given; without those that cannot start."""
    made: list[Tracker] = []
    try:
        for node in nodes(run.settings.logger.node if logger is None else logger).values():
            if (tracker := _adapter(node).begin(run, node)) is not None:
                made.append(tracker)
    except BaseException:
        for tracker in made:
            tracker.close(1)
        raise
    return made


def loggers(trackers: Sequence[Tracker]) -> list[Logger]:
    """Lightning's loggers, for the training loop."""
    return [tracker.logger for tracker in trackers]


def log_results(trackers: Sequence[Tracker], run: Run, metrics: Mapping[str, Any]) -> None:
    """Logs a judged run's numbers, images and tables (`content.Results`)."""
    if trackers:
        results = content.results_of(run, metrics)
        for tracker in trackers:
            tracker.results(results)


def log_attacks(trackers: Sequence[Tracker], attacks: Mapping[str, Any]) -> None:
    """Logs the numbers of attacks, {name: numbers}, as `log_results` logs them with the others."""
    for tracker in trackers:
        tracker.numbers(content.attacks_of(attacks))


def log_weights(trackers: Sequence[Tracker], run: Run) -> None:
    """Stores the weights and the settings of a run, if logger.artifact is true."""
    files = [file for file in (run.erased, run.folder / paths.CONFIG) if file.is_file()]
    if run.settings.logger.artifact and run.erased.is_file():
        for tracker in trackers:
            tracker.weights(run, files)


def log_judged(run: Run, metrics: Mapping[str, Any], typed: Mapping[str, Any] | None = None) -> None:
    """Logs the results of an existing run to its own trackers (`reopened`)."""
    shared = {key: value for key, value in run.settings.logger.node.items() if key in SHARED}
    if typed is not None:
        shared["artifact"] = bool(typed.get("artifact"))
    with reopened(run, typed) as trackers:
        log_results(trackers, run, metrics)
        log_weights(trackers, Run(run.folder, {**run.config, "logger": shared}))


@contextmanager
def reopened(run: Run, typed: Mapping[str, Any] | None) -> Iterator[list[Tracker]]:
    """The own trackers of an existing run, which are closed at the end of the block. typed: the logger settings of the
    command; None: those of the run are the command's, and only trackers whose agent may wait for the numbers are
    opened.

    If `typed` has no tracker, there is none. Otherwise a tracker gets from the run folder only settings that do no harm
    (`Tracker.again`).
    """
    own = nodes(run.settings.logger.node)
    if typed is None:
        chosen = {name: node for name, node in own.items() if _adapter(node).has_agent}
    elif not nodes(typed):
        chosen = {}
    else:
        found = {name: _again(name, node, typed) for name, node in own.items()}
        chosen = {name: node for name, node in found.items() if node is not None}
    trackers = make(run, {**chosen.pop("", {}), **chosen}) if chosen else []
    with closing(trackers):
        yield trackers


@contextmanager
def tracked(session: Session) -> Iterator[tuple[Session, list[Tracker]]]:
    """The session with the loggers of the run's trackers, and the trackers, which only the first process has. They are
    closed at the end of the block."""
    made = make(session.run) if session.ranks.first else []
    with closing(made):
        yield replace(session, loggers=loggers(made)), made


@contextmanager
def closing(trackers: Sequence[Tracker]) -> Iterator[None]:
    """Ends the run in every tracker at the end of the block, as failed or killed after an error or Ctrl-C."""
    status = 1
    try:
        yield
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
        raise
    finally:
        for tracker in trackers:
            tracker.close(status)


def _adapter(node: Mapping[str, Any]) -> type[Tracker]:
    return ADAPTERS.get(kind(node.get("_target_")), Tracker)


def _again(name: str, node: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings with which a command logs the results of a run's tracker; None if it may not, which is logged.
    typed: the command's logger settings."""
    adapter, here = _adapter(node), nodes(typed).get(name)
    chosen = here is not None and _adapter(here) is adapter
    found = adapter.again(node, here if here is not None and chosen else _defaults(name))
    if not isinstance(found, str):
        return found
    choice = "" if chosen else f"logger={name or 'NAME'} "
    words = f"the run folder names {found} {node.get(found)}; type {choice}{dotted(name)}.{found}={node.get(found)}"
    if found == "_target_":
        words = f"they belong to a logger of your own; type {choice.strip()}"
    log.warning("the results were not sent to %s: %s to send them", adapter.title, words)
    return None


def _defaults(name: str) -> dict[str, Any]:
    """The settings of the package's yaml for a tracker of this name, as a command without them has them."""
    file = paths.CONF_DIR / "logger" / f"{name}.yaml"
    if not name.isidentifier() or not file.is_file():
        return {}
    resolvers.register_resolvers()
    loaded: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    return nodes(loaded).get(name, {})
