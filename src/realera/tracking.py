"""Weights & Biases: one W&B run for a run folder, gone on with when the run is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger

from realera.evaluation.report import veiled
from realera.evaluation.results import scalars
from realera.evaluation.sheets import blurred, image_rows
from realera.runs import Run, digest, identity

ROWS_PER_SPLIT = 12  # images of each split in the table


def make(run: Run) -> list[Logger]:
    """The loggers a run's config asks for: none, or W&B's."""
    node = run.config.get("logger") or {}
    if not node.get("_target_"):
        return []
    import wandb

    # quiet before Lightning names a setting that W&B has retired; what a run is called stands in our own log
    wandb.setup(wandb.Settings(silent=True))
    name = run.folder.name
    logger: Logger = instantiate(node, save_dir=str(run.folder), name=name, id=digest([name, identity(run.config)]))
    logger.log_hyperparams(run.config)
    return [logger]


def log_results(loggers: Sequence[Logger], run: Run, metrics: Mapping[str, Any]) -> None:
    """eval/* scalars, and a table of prompt, seed, split, original, erased, verdict. Images that the page shows only
    when asked (`blur`) leave this machine blurred."""
    for logger in loggers:
        logger.log_metrics({f"eval/{name}": value for name, value in scalars(metrics).items()})
        if isinstance(logger, WandbLogger):
            with _staged_in(run.folder):
                logger.experiment.log({"sheets": _table(run.folder, metrics, veiled(run.config, metrics))})


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """W&B copies a table's images to the home folder until they are sent; here they stay with the run's other files, so
    that an offline run is whole. Where WANDB_DATA_DIR is set, it decides."""
    name = "WANDB_DATA_DIR"
    if os.environ.get(name):
        yield
        return
    os.environ[name] = str((folder / "wandb").absolute())
    try:
        yield
    finally:
        del os.environ[name]


def finish(loggers: Sequence[Logger]) -> None:
    """Ends the W&B run, so that the next job of a sweep begins its own."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish()


def _table(folder: Path, metrics: Mapping[str, Any], blur: bool) -> Any:
    """Images beside each other with their verdict, the first of each split."""
    import wandb

    def image(file: Path | None) -> Any:
        return None if file is None else wandb.Image(blurred(file) if blur else str(file))

    table = wandb.Table(columns=["prompt", "seed", "split", "original", "erased", "verdict"])
    taken: dict[str, int] = {}
    judge, headline = metrics["protocol"]["judge"]["judge"], metrics["headline"]
    for prompt, seed, split, original, erased, verdict in image_rows(folder, judge, headline):
        taken[split] = taken.get(split, 0) + 1
        if taken[split] <= ROWS_PER_SPLIT:
            table.add_data(prompt, seed, split, image(original), image(erased), verdict)
    return table
