"""TensorBoard and CSV: files in the run folder, or in a folder of the user's for all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger

from realera.evaluation.measures import ORDER
from realera.runs.folders import Run
from realera.settings.instantiate import build
from realera.settings.loggers import KINDS
from realera.tracking import content
from realera.tracking.base import Known
from realera.tracking.content import Results, Table

HEADLINE = (*(f"eval/{name}" for name in ORDER), "cost/seconds")  # the columns of TensorBoard's HPARAMS
EVENTS = "events.out.tfevents.*"


class TensorBoardFiles(Known):
    """Scalars, settings (HPARAMS), a grid of images for each split, and tables as text. A run that is continued adds an
    event file to the same folder, which TensorBoard shows as one run. The curves of an attack have a folder of their
    own, whose files are replaced: an attack with other settings is not one line with the one before."""

    title = KINDS["TensorBoardLogger"].title
    places = ("save_dir",)

    @classmethod
    def start(cls, run: Run, node: Mapping[str, Any]) -> Logger:
        place = {"version": "", "default_hp_metric": False, **place_of(run, node, "tensorboard")}
        logger: Logger = build({**node, **place})
        logger.log_hyperparams(content.settings_of(run))
        return logger

    def _results(self, results: Results) -> None:
        shown = {name: value for name, value in results.scalars.items() if name in HEADLINE}
        rest = {name: value for name, value in results.scalars.items() if name not in HEADLINE}
        logger: Any = self.logger
        self._scalars(rest)
        logger.log_hyperparams(dict(results.settings), metrics=shown, step=self.step)
        for split, grid in results.grids():
            logger.experiment.add_image(f"sheets/{split}", np.asarray(grid), self.step, dataformats="HWC")
        for name, table in results.tables.items():
            logger.experiment.add_text(name, markdown(table.words()), self.step)

    def _curves(self, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        logger: Any = self.logger
        folders = dict.fromkeys(name.rpartition("/")[0] for name in curves)
        for folder in folders:
            place = Path(logger.log_dir) / folder
            for old in place.glob(EVENTS):
                old.unlink()
            with type(logger.experiment)(log_dir=str(place)) as writer:
                for name in (name for name in curves if name.rpartition("/")[0] == folder):
                    for step, value in curves[name]:
                        writer.add_scalar(name, value, step)


class CsvFile(Known):
    """Scalars and settings. A run that is continued writes to the next version_N, because Lightning's logger deletes
    what it finds in the folder that it writes to."""

    title = KINDS["CSVLogger"].title
    places = ("save_dir",)

    @classmethod
    def start(cls, run: Run, node: Mapping[str, Any]) -> Logger:
        logger: Logger = build({**node, **place_of(run, node, "csv")})
        logger.log_hyperparams(content.settings_of(run))
        return logger

    def _results(self, results: Results) -> None:
        self._scalars(results.scalars)


def place_of(run: Run, node: Mapping[str, Any], name: str) -> dict[str, Any]:
    """save_dir and name of Lightning's loggers of files: <run folder>/<name>, or <save_dir>/<the run folder's name> if
    the settings have a save_dir. A typed name is kept."""
    own = node.get("save_dir")
    place = {"save_dir": str(own or run.folder.absolute()), "name": run.folder.name if own else name}
    return {key: value for key, value in place.items() if key == "save_dir" or not node.get(key)}


def markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else " ".join(str(value).split())
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>|#" else letter for letter in text)
