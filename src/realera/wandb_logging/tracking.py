"""Weights & Biases: one W&B run per run folder, continued when the run is resumed or judged again."""

from __future__ import annotations

import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

from lightning.pytorch.loggers import Logger, WandbLogger

from realera import costs, paths
from realera.contracts import UserError
from realera.evaluation.measures import ORDER
from realera.evaluation.results import scalars
from realera.files import checksums
from realera.reporting.run_page import is_blurred
from realera.reporting.sheets import blurred, image_rows
from realera.runs.folders import Run, digest, identity
from realera.runs.session import Session
from realera.settings import composition, error_sentences
from realera.settings.instantiate import NotBuilt, build, locate
from realera.settings.run_settings import Settings
from realera.sweeps import jobs
from realera.system import disk
from realera.wandb_logging.panels import SURFACES

log = logging.getLogger(__name__)

ROWS_PER_SPLIT = 12  # images of each split in the table, unless logger.images says otherwise
SHORT = 100  # entries; a longer list (such as 30,000 captions of a protocol) is logged as its length
TAG = 64  # characters, W&B's limit
ID = re.compile(r"[\w-]{1,128}", re.ASCII)  # run ids that W&B's server accepts
INTERRUPTED = 255  # W&B's exit status of a process that Ctrl-C ended
OF_A_RUN = ("_target_", "project", "entity", "mode", "group", "tags", "images")  # logger settings from a run folder
TAGGED = 5  # concepts that become tags: the first ones


def make(run: Run, node: Mapping[str, Any] | None = None) -> list[Logger]:
    """The loggers of a run's config, or of `node` if given: [] or one W&B logger."""
    node = dict(run.settings.logger.node if node is None else node)
    if not node.get("_target_"):
        return []
    import wandb

    name = run.folder.name
    node.pop("images", None)
    begins = not (run.folder / paths.WANDB_ID).is_file()  # a resumed run stays in its group
    node["group"] = node.get("group") or (os.environ["REALERA_STAMP"] if begins and composition.in_sweep() else None)
    node["tags"] = list(dict.fromkeys([*tags(run.config), *(node.get("tags") or ())]))
    node["job_type"] = "evaluate" if run.settings.unedited else "train"
    place = str(run.folder.absolute())  # W&B's process has another working directory
    settings = {**_loggable(run.config), "system": system(run)}
    for mode in dict.fromkeys((node.get("mode"), "offline")):
        try:
            # silences W&B's warning about a deprecated setting that Lightning uses; realera logs the run's name itself
            wandb.setup(wandb.Settings(silent=True))
            logger: Logger = build({**node, "mode": mode}, save_dir=place, name=name, id=run_id(run))
            logger.log_hyperparams(settings)
        except (UserError, NotBuilt):  # an invalid setting
            raise
        except Exception as error:
            why = error_sentences.first_line(error)
            wandb.teardown()  # W&B's helper process keeps the run's id in use
        else:
            if mode != node.get("mode"):
                log.warning("W&B is offline (%s): send the run later with wandb sync %s", why, run.folder / "wandb/*")
            return [fail_safe(logger)]
    log.warning("W&B could not start a run (%s): the run continues without W&B", why)
    return []


def fail_safe(logger: Logger) -> Logger:
    """Makes the logger stop logging after its first failure instead of ending the run. Returns the same logger."""
    for name in ("log_hyperparams", "log_metrics", "save", "finalize"):
        setattr(logger, name, partial(_attempt, logger, getattr(logger, name)))
    return logger


_failed: WeakSet[Logger] = WeakSet()


def _attempt(logger: Logger, call: Callable[..., Any], *given: Any, **more: Any) -> None:
    if logger in _failed:
        return
    try:
        call(*given, **more)
    except Exception as error:
        _failed.add(logger)
        log.warning(
            "W&B failed (%s: %s): the run continues without W&B",
            type(error).__name__,
            error_sentences.first_line(error),
        )


def run_id(run: Run) -> str:
    """The id of the run folder's W&B run. It is made with the folder's first logger and saved in the folder, so a run
    that is resumed, judged again or moved stays one W&B run. A folder of the same settings elsewhere has another id.
    Under an agent of a W&B sweep it is the agent's id, because W&B ignores any other."""
    file = run.folder / paths.WANDB_ID
    kept = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    if not ID.fullmatch(kept):
        if file.is_file():
            checksums.log_torn(file)
        # Runs that were logged before ids were saved have an id derived from their settings.
        before = digest([run.folder.name, identity(run.config)]) if (run.folder / "wandb").is_dir() else None
        from_agent = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        kept = before or from_agent or uuid.uuid4().hex[:12]
        disk.write_text(file, f"{kept}\n")
    return kept


def tags(config: Mapping[str, Any]) -> list[str]:
    """Tags to filter runs by: task, method, backbone and the first concepts."""
    settings = Settings(config)
    task = getattr(locate(str(settings.task.target)), "name", None)
    parts = settings.method.name, settings.backbone.name
    concepts = [] if settings.concept is None else settings.concepts
    more = f"and {len(concepts) - TAGGED} more" if len(concepts) > TAGGED else None
    return [str(word)[:TAG] for word in (task, *parts, *concepts[:TAGGED], more) if word]


def system(run: Run) -> str:
    """The run's system in tables of several runs."""
    return jobs.system(run.config)


def log_results(loggers: Sequence[Logger], run: Run, metrics: Mapping[str, Any]) -> None:
    """eval/* and cost/* scalars, the protocol, and two tables: `sheets` (prompt, seed, split, original, erased,
    verdict), `cell` (the run's numbers in one row, for charts over runs). Images that the page blurs (`blur`) are
    uploaded blurred."""
    if not loggers:
        return
    numbers = scalars(metrics)
    spent = costs.scalars(costs.read(run.folder))
    for logger in loggers:
        named = {f"eval/{name}": value for name, value in numbers.items()}
        logger.log_metrics({**named, **{f"cost/{name}": value for name, value in spent.items()}})
        if isinstance(logger, WandbLogger):
            _attempt(logger, _log_tables, logger, run, metrics, spent)


def _log_tables(logger: WandbLogger, run: Run, metrics: Mapping[str, Any], spent: Mapping[str, float]) -> None:
    logger.experiment.config.update({"protocol": _loggable(metrics["protocol"])}, allow_val_change=True)
    asked = run.settings.logger.images
    most = ROWS_PER_SPLIT if asked is None else asked
    with _staged_in(run.folder):
        tables = {"cell": _cell(run, metrics, spent)}
        if most:
            tables["sheets"] = _sheets(run, metrics, most, is_blurred(run.config, metrics))
        logger.experiment.log(tables)


def log_judged(run: Run, metrics: Mapping[str, Any], typed: Mapping[str, Any] | None = None) -> None:
    """Logs the results of an existing run to its W&B run. typed: the logger node of the command. If it is `none`,
    nothing is logged; otherwise the run's own logger is used, with the command's online or offline mode."""
    node = dict(run.settings.logger.node)
    if typed is not None:
        known = {key: value for key, value in node.items() if key in OF_A_RUN}
        node = {**known, "mode": typed.get("mode")} if typed.get("_target_") and node.get("_target_") else {}
        entity = node.get("entity")
        if entity not in (None, typed.get("entity")) and node["mode"] not in ("offline", "disabled", "dryrun"):
            logging.getLogger("realera").warning(
                "the results were not sent to W&B: the run folder names entity %s; type logger.entity=%s to send them",
                entity,
                entity,
            )
            return
    loggers = make(run, node)
    with closing(loggers):
        log_results(loggers, run, metrics)


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Makes W&B save a table's images in the run folder instead of the home folder until they are sent, so that an
    offline run is complete. A WANDB_DATA_DIR that is already set has priority."""
    name = "WANDB_DATA_DIR"
    if os.environ.get(name):
        yield
        return
    os.environ[name] = str((folder / "wandb").absolute())
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def logged(session: Session) -> Iterator[Session]:
    """The session with the run's loggers, which only the first process has. They are closed at the end of the block."""
    loggers = make(session.run) if session.ranks.first else []
    with closing(loggers):
        yield replace(session, loggers=loggers)


@contextmanager
def closing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Ends the W&B run at the end of the block, so that the next job of a sweep starts its own. After an error or
    Ctrl-C the W&B run has the same status as if its process had ended that way."""
    status = 1
    try:
        yield
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
        raise
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                _attempt(logger, wandb.finish, exit_code=status)


def _loggable(node: Any) -> Any:
    """Settings in a form that W&B can store and show: without long lists and infinite numbers."""
    if isinstance(node, Mapping):
        short = len(node) <= SHORT
        return {str(key): _loggable(value) for key, value in node.items()} if short else f"{len(node)} entries"
    if isinstance(node, (list, tuple)):
        return [_loggable(value) for value in node] if len(node) <= SHORT else f"{len(node)} entries"
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


def _cell(run: Run, metrics: Mapping[str, Any], spent: Mapping[str, float]) -> Any:
    """One row: run, system, concept, settings, and the main metrics with their intervals (None if not measured)."""
    import wandb

    mining = run.settings.method.neighbours.node
    row: dict[str, Any] = {"run": run.folder.name, "system": system(run), "seed": run.settings.seed}
    row["concept"] = ", ".join(c["target"] for c in metrics["protocol"].get("concepts", [])[:TAGGED])
    row |= {axis: _loggable(mining.get(axis)) for pair in SURFACES for axis in pair}
    for name in ORDER:
        estimate = metrics["main"].get(name) or {}
        row |= {f"{name}{end}": estimate.get(key) for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))}
    row |= {name: spent.get(name) for name in ("seconds", "passes")}  # to erase
    return wandb.Table(columns=list(row), data=[list(row.values())], allow_mixed_types=True)


def _sheets(run: Run, metrics: Mapping[str, Any], most: int, blur: bool) -> Any:
    """Images before and after erasing with their verdict, the first `most` of each split."""
    import wandb

    def image(file: Path | None) -> Any:
        return None if file is None else wandb.Image(blurred(file) if blur else str(file))

    table = wandb.Table(columns=["prompt", "seed", "split", "original", "erased", "verdict"])
    taken: dict[str, int] = {}
    judge, headline = metrics["protocol"]["judge"]["judge"], metrics["headline"]
    for prompt, seed, split, original, erased, verdict in image_rows(run.folder, judge, headline):
        taken[split] = taken.get(split, 0) + 1
        if taken[split] <= most:
            before, after = (erased, None) if run.settings.unedited else (original, erased)
            table.add_data(prompt, seed, split, image(before), image(after), verdict)
    return table
