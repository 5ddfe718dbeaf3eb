"""MLflow: one MLflow run per run folder, continued when the run is resumed or judged again."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from realera import paths
from realera.files import plain_data
from realera.runs.folders import Run
from realera.settings import composition
from realera.settings.instantiate import build
from realera.settings.loggers import KINDS
from realera.system import disk
from realera.tracking import content
from realera.tracking.base import INTERRUPTED, Known
from realera.tracking.content import Results, Table

ID = re.compile(r"[0-9a-f]{32}")
TRIES = 3  # jobs of a sweep that start together make the same experiment, and all but one of them fail at first
AT_ONCE = 500  # metrics in one request; MLflow takes 1,000
TAG = 500  # characters of a tag; MLflow's stores take 5,000, and earlier ones 500
TABLES = "mlflow.loggedArtifacts"  # the tag in which MLflow keeps the files that it shows as tables


class MlflowRun(Known):
    title = KINDS["MLFlowLogger"].title
    from_run = ("_target_", "experiment_name", "tags")
    places = ("tracking_uri", "artifact_location")

    @classmethod
    def start(cls, run: Run, node: Mapping[str, Any]) -> Logger:
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # otherwise a line for each table of a new database
        logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
        kept = _kept(run, node)
        name = os.environ.get("MLFLOW_RUN_NAME") or run.folder.name
        for attempt in range(TRIES):
            try:
                logger: Any = build({**node, "tags": _tags(run, node)}, run_name=name, run_id=kept)
                found = logger.run_id
                break
            except Exception:
                if attempt == TRIES - 1:
                    raise
                time.sleep(1 + attempt)
        if kept is None:  # MLflow refuses a second value of a parameter, so only a new run gets them
            disk.write_text(run.folder / paths.MLFLOW_ID, f"{found}\n")
            logger.log_hyperparams(content.settings_of(run))
        else:
            logger.experiment.update_run(found, status="RUNNING")
        made: Logger = logger
        return made

    def weights(self, run: Run, files: Sequence[Path]) -> None:
        self.attempt(self._weights, files)

    def close(self, status: int) -> None:
        ended = {0: "success", INTERRUPTED: "KILLED"}
        self.attempt(self._finalize, ended.get(status, "failed"))

    def _scalars(self, scalars: Mapping[str, float]) -> None:
        numbers = iter(scalars.items())
        while some := dict(islice(numbers, AT_ONCE)):
            self._log_metrics(some, step=self.step)

    def _results(self, results: Results) -> None:
        self._scalars(results.scalars)
        logger: Any = self.logger
        client, run_id = logger.experiment, logger.run_id
        client.log_text(run_id, plain_data.json_text(results.protocol, indent=1), "protocol.json")
        for split, grid in results.grids():
            client.log_image(run_id, grid, f"sheets/{split}.png")
        for name, table in results.tables.items():
            client.log_text(run_id, _as_json(table.words()), f"{name}.json")
        shown = [{"path": f"{name}.json", "type": "table"} for name in results.tables]
        client.set_tag(run_id, TABLES, plain_data.json_text(shown))

    def _weights(self, files: Sequence[Path]) -> None:
        logger: Any = self.logger
        for file in files:
            logger.experiment.log_artifact(logger.run_id, str(file), "weights")


def _kept(run: Run, node: Mapping[str, Any]) -> str | None:
    """The MLflow run in which the run folder was logged; None if there is none in this store."""
    file = run.folder / paths.MLFLOW_ID
    kept = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    if not ID.fullmatch(kept):
        return None
    try:
        found = build({**node, "tags": None}, run_id=kept).experiment.get_run(kept)
    except Exception:  # another store, or none: the first call of a new run says why
        return None
    return kept if found.info.lifecycle_stage == "active" else None


def _tags(run: Run, node: Mapping[str, Any]) -> dict[str, str]:
    """The tags by which MLflow filters runs."""
    facts = content.facts(run.config)
    group = os.environ["REALERA_STAMP"] if composition.in_sweep() else None
    named = {**facts, "concepts": ", ".join(map(str, facts["concepts"])), "system": content.system(run)}
    named |= {"job_type": content.job_type(run), "group": group, **(node.get("tags") or {})}
    return {name: str(value)[:TAG] for name, value in named.items() if value}


def _as_json(table: Table) -> str:
    """The form of `mlflow.log_table`, which would need pandas: {"columns": [...], "data": [[...], ...]}."""
    return plain_data.json_text({"columns": list(table.columns), "data": [list(row) for row in table.rows]})
