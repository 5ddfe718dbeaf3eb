"""Weights & Biases: one W&B run per run folder, continued when the run is resumed or judged again."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from realera import paths
from realera.contracts import UserError
from realera.files import checksums
from realera.runs.folders import Run, digest, identity
from realera.settings import composition, error_sentences, resolvers
from realera.settings.instantiate import NotBuilt, build
from realera.settings.loggers import WANDB
from realera.system import disk
from realera.tracking import content
from realera.tracking.base import Known, Tracker, log
from realera.tracking.content import Picture, Results, Table

OFFLINE = ("offline", "disabled", "dryrun")  # modes that send nothing
TAG = 64  # characters, W&B's limit
ID = re.compile(r"[\w-]{1,128}", re.ASCII)  # run ids that W&B's server accepts


class WandbRun(Known):
    title = WANDB.title
    has_agent = True
    from_run = ("_target_", "project", "entity", "mode", "group", "tags")
    places = ("entity",)

    def __init__(self, logger: Logger, folder: Path) -> None:
        super().__init__(logger)
        self.folder = folder

    @classmethod
    def begin(cls, run: Run, node: Mapping[str, Any]) -> Tracker | None:
        """Offline, if the server cannot be reached."""
        import wandb

        for mode in dict.fromkeys((node.get("mode"), "offline")):
            try:
                # silences W&B's warning about a deprecated setting that Lightning uses; realera logs the run's name
                wandb.setup(wandb.Settings(silent=True))
                logger = cls.start(run, {**node, "mode": mode})
            except (UserError, NotBuilt):  # an invalid setting
                raise
            except Exception as error:
                why = error_sentences.first_line(error)
                wandb.teardown()  # W&B's helper process keeps the run's id in use
            else:
                if mode != node.get("mode"):
                    place = run.folder / "wandb/*"
                    log.warning("W&B is offline (%s): send the run later with wandb sync %s", why, place)
                return cls(logger, run.folder)
        log.warning("W&B could not start a run (%s): the run continues without W&B", why)
        return None

    @classmethod
    def start(cls, run: Run, node: Mapping[str, Any]) -> Logger:
        begins = not (run.folder / paths.WANDB_ID).is_file()  # a resumed run stays in its group
        sweep = os.environ["REALERA_STAMP"] if begins and composition.in_sweep() else None
        logger: Logger = build(
            {
                **node,
                "group": node.get("group") or os.environ.get("WANDB_RUN_GROUP") or sweep,
                "tags": list(dict.fromkeys([*tags(run.config), *(node.get("tags") or ()), *_typed_tags()])),
                "job_type": content.job_type(run),
            },
            save_dir=str(run.folder.absolute()),  # W&B's process has another working directory
            name=os.environ.get("WANDB_NAME") or run.folder.name,
            id=run_id(run),
        )
        logger.log_hyperparams(content.settings_of(run))
        return logger

    @classmethod
    def again(cls, node: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | str:
        """The run's own entity, in the command's mode: offline nothing is sent, so there any entity is allowed."""
        mode = given["mode"] if "mode" in given else resolvers.wandb_mode()
        own = {"entity": node["entity"]} if "entity" in node else {}
        found = super().again(node, own if mode in OFFLINE else given)
        return found if isinstance(found, str) else {**found, **own, "mode": mode}

    def weights(self, run: Run, files: Sequence[Path]) -> None:
        self.attempt(self._weights, run, files)

    def close(self, status: int) -> None:
        """Ends the W&B run, so that the next job of a sweep starts its own. After an error or Ctrl-C it has the same
        status as if its process had ended that way."""
        import wandb

        self.attempt(wandb.finish, exit_code=status)

    def _scalars(self, scalars: Mapping[str, float]) -> None:
        self._log_metrics(scalars)

    def _results(self, results: Results) -> None:
        """Also the protocol, in the W&B run's config."""
        self._scalars(results.scalars)
        experiment: Any = self.logger.experiment
        experiment.config.update({"protocol": results.protocol}, allow_val_change=True)
        with _staged_in(self.folder):
            experiment.log({name: _as_wandb(table) for name, table in results.tables.items()})

    def _weights(self, run: Run, files: Sequence[Path]) -> None:
        import wandb

        experiment: Any = self.logger.experiment
        artifact = wandb.Artifact(f"weights-{experiment.id}", type="model", metadata={"run": run.folder.name})
        with _staged_in(self.folder):
            for file in files:
                artifact.add_file(str(file), policy="immutable")  # not copied: the run folder keeps it
            experiment.log_artifact(artifact)


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
    *parts, concepts = content.facts(config).values()
    return [str(word)[:TAG] for word in (*parts, *concepts) if word]


def _typed_tags() -> list[str]:
    """The tags in the environment, which W&B reads only if it is given none."""
    return [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]


def _as_wandb(table: Table) -> Any:
    import wandb

    def cell(value: Any) -> Any:
        if not isinstance(value, Picture):
            return value
        return wandb.Image(value.image() if value.hidden else str(value.file))

    rows = [[cell(value) for value in row] for row in table.rows]
    return wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)


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
