"""The interface of a tracker: one Lightning logger, and how it stores what the logger's own interface has no call for.

A tracker never ends a run: after its first failure it warns once and stops.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.loggers import Logger

from realera.contracts import UserError
from realera.runs.folders import Run
from realera.settings import error_sentences
from realera.settings.instantiate import NotBuilt, build, locate
from realera.settings.loggers import OTHER
from realera.tracking import content
from realera.tracking.content import Numbers, Results

log = logging.getLogger("realera.tracking")

INTERRUPTED = 255  # exit status of a run that Ctrl-C ended


class Tracker:
    """A Lightning logger of the user's own: it gets settings and scalars, and images and tables if it has the methods
    `log_image(key, images)` and `log_table(key, columns, data)` of Lightning's WandbLogger.

    logger: gets settings and scalars from the training loop. Its calls are guarded, see `attempt`. It is closed by
    `close` and not at the end of training, because the results follow. title: its name in warnings. has_agent: whether
    an agent that started the command may wait for the numbers of a run that was finished before.
    """

    title: ClassVar[str] = OTHER.title
    has_agent: ClassVar[bool] = False

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.failed = False
        self.step = 0  # the last one of the training loop
        self._finalize = logger.finalize
        self._log_metrics, self._save = logger.log_metrics, logger.save
        guarded: dict[str, Callable[..., Any]] = {
            "log_hyperparams": logger.log_hyperparams,
            "log_metrics": self._step,
            "save": self._save,
            "finalize": self._end_of_training,
        }
        for name, call in guarded.items():
            setattr(logger, name, partial(self.attempt, call))

    @classmethod
    def begin(cls, run: Run, node: Mapping[str, Any]) -> Tracker | None:
        """A tracker of a run by the settings `node`, with the run's settings logged; None if it cannot start, which is
        logged.

        Raises:
            UserError, NotBuilt: a setting is not valid, or a library is not installed.
        """
        try:
            return cls(cls.start(run, node))
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, NotBuilt) and isinstance(error.__cause__, TypeError | ImportError):
                raise
            why = error_sentences.first_line(error.__cause__ or error)
            log.warning("%s could not start (%s): the run continues without it", cls.title, why)
            return None

    @classmethod
    def start(cls, run: Run, node: Mapping[str, Any]) -> Logger:
        """The logger, with the run's settings logged."""
        logger = as_logger(build(node, **_save_dir(run, node)))
        logger.log_hyperparams(content.settings_of(run))
        return logger

    @classmethod
    def again(cls, node: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | str:
        """The settings with which the results of an existing run are logged. node: those in the run folder, which
        somebody else may have written; given: the command's for this tracker. A text: the key of a setting of the run
        that only a command may choose, and that this one did not choose.

        Nobody knows which settings of a user's class do no harm, so all must be the command's.
        """
        return dict(given) if given.get("_target_") == node.get("_target_") else "_target_"

    def results(self, results: Results) -> None:
        """Logs the final numbers, images and tables."""
        self.attempt(self._results, results)
        self.attempt(self._curves, results.curves)

    def numbers(self, numbers: Numbers) -> None:
        """Logs further numbers of a run, such as those of an attack."""
        self.attempt(self._scalars, numbers.scalars)
        self.attempt(self._curves, numbers.curves)

    def weights(self, run: Run, files: Sequence[Path]) -> None:
        """Stores the files of a run's weights, if the tracker stores files."""

    def close(self, status: int) -> None:
        """Ends the run in the tracker. status: the exit status of the run's process."""
        self.attempt(self._finalize, "failed" if status else "success")

    def attempt(self, call: Callable[..., Any], *given: Any, **more: Any) -> None:
        """Calls, unless an earlier call has failed. A failure is logged as a warning."""
        if self.failed:
            return
        try:
            call(*given, **more)
        except Exception as error:
            self.failed = True
            log.warning(
                "%s failed (%s: %s): the run continues without %s",
                self.title,
                type(error).__name__,
                error_sentences.first_line(error),
                "it" if self.title == Tracker.title else self.title,
            )

    def _step(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.step = self.step if step is None else step
        self._log_metrics(metrics, step=step)

    def _end_of_training(self, status: str) -> None:
        self._save()

    def _scalars(self, scalars: Mapping[str, float]) -> None:
        self._log_metrics(scalars, step=self.step)

    def _curves(self, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        for name, points in curves.items():
            for step, value in points:
                self._log_metrics({name: value}, step=step)

    def _results(self, results: Results) -> None:
        self._scalars(results.scalars)
        log_image, log_table = (getattr(self.logger, name, None) for name in ("log_image", "log_table"))
        if callable(log_image):
            for split, grid in results.grids():
                log_image(key=f"sheets/{split}", images=[grid])
        if callable(log_table):
            for name, table in results.tables.items():
                words = table.words()
                log_table(key=name, columns=list(words.columns), data=[list(row) for row in words.rows])


class Known(Tracker):
    """A tracker whose settings are known. from_run: those that evaluate takes from a run folder. places: those that
    decide where data is sent."""

    from_run: ClassVar[tuple[str, ...]] = ("_target_",)
    places: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def again(cls, node: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | str:
        for key in cls.places:
            if node.get(key) not in (None, given.get(key)):
                return key
        own = {key: value for key, value in node.items() if key in cls.from_run}
        return {**own, **{key: given[key] for key in cls.places if key in given}}


def as_logger(made: Any) -> Logger:
    """What a logger's settings build. Raises UserError if it is no Lightning logger."""
    if not isinstance(made, Logger):
        raise UserError(
            f"logger._target_ builds a {type(made).__name__}, which is no Lightning logger: give a subclass of "
            "lightning.pytorch.loggers.Logger."
        )
    return made


def _save_dir(run: Run, node: Mapping[str, Any]) -> dict[str, Any]:
    """The run folder as save_dir, for a user's class that needs one and whose settings have none."""
    try:
        taken = inspect.signature(locate(str(node["_target_"]))).parameters
    except (TypeError, ValueError, ImportError):
        return {}
    return {"save_dir": str(run.folder.absolute())} if "save_dir" in taken and not node.get("save_dir") else {}
