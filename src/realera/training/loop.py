"""The training loop: Lightning's Trainer, its settings and its callbacks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from realera.contracts import UserError
from realera.settings.command_settings import OURS
from realera.training import saved
from realera.training.callbacks import ClosedFormEdit, FitProgress, Measured, PrepareLatents
from realera.training.editing import Editing
from realera.training.losses import LossLines
from realera.training.module import ErasureModule
from realera.training.resuming import Checkpoints, KeepSignalHandler
from realera.training.schedule import clip_of, steps_of

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # the trained weights are float32 in all of them


def run(
    editing: Editing,
    *,
    cache: Path,
    checkpoint_every: int | None = None,
    trainer: Mapping[str, Any] | None = None,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Carries out an erasure with its training, or resumes it. cache: folder for the latents that are trained on. For
    the rest see `fit`. Returns the trainer, which knows the processes."""
    method, run_dir, meter = editing.method, editing.run_dir, editing.meter
    checkpoints = Checkpoints(run_dir, editing.origin.identity, losses := LossLines(run_dir), checkpoint_every)
    checkpoints.look()
    settings = dict(trainer or {})
    if settings.get("gradient_clip_val", "method") == "method":
        settings["gradient_clip_val"] = clip_of(method.align)
    module = ErasureModule(editing.backbone, method, editing.pairs, editing.seed)
    around = [
        ClosedFormEdit(editing),
        PrepareLatents(cache, meter),
        Measured(meter),
        losses,
        FitProgress(f"Aligning noise ({method.name})"),
        *callbacks,
        checkpoints,
        KeepSignalHandler(),
    ]
    with _quiet():
        runner = _trainer(settings, steps_of(method.align, len(editing.pairs)), run_dir, loggers, around)
        with saved.without_checkpoint(run_dir, runner.is_global_zero):
            try:
                runner.fit(module)
            except SystemExit:
                if runner.interrupted:  # Lightning turns Ctrl-C into SystemExit
                    raise KeyboardInterrupt from None
                raise
    return runner


def _trainer(
    given: Mapping[str, Any], steps: int, run_dir: Path, loggers: Sequence[Logger], callbacks: list[Callback]
) -> Trainer:
    for name, instead in OURS.items():
        if name in given:
            raise UserError(f"trainer.{name} is not a setting: use {instead}.")
    settings = {"log_every_n_steps": 1, "precision": "32-true", **given}
    if settings["precision"] not in PRECISIONS:
        raise UserError(
            f"trainer.precision={settings['precision']} is not supported: choose one of {', '.join(PRECISIONS)}."
        )
    if steps == 0:  # there is no work to share between processes, and DDP refuses a model without gradients
        devices = settings.get("devices")
        settings |= {"devices": devices[:1] if isinstance(devices, list) else 1, "num_nodes": 1, "strategy": "auto"}
    if settings.get("strategy") == "ddp":
        # Attention losses give no gradient to the layers after the last map. Setting these gradients to zero would
        # spare DDP the search, but then AdamW's weight decay would move weights that a single process does not move.
        settings["strategy"] = "ddp_find_unused_parameters_true"
    # If torch.distributed is initialised, RANK gives the process's number, not the scheduler's variables. Lightning's
    # Slurm environment would also requeue the job at a signal, which is not needed: the same command resumes the run.
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    environment = [LightningEnvironment()] if initialised or SLURMEnvironment.detect() else []
    try:
        return Trainer(
            max_steps=steps,
            default_root_dir=run_dir,
            logger=list(loggers) or False,
            callbacks=callbacks,
            plugins=[*environment],
            enable_checkpointing=False,  # `Checkpoints` saves them
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **settings,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"These trainer settings do not work ({reason}): try trainer=default.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides Lightning's banners and its warnings about data loaders."""
    banners = logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric")
    levels = [logger.level for logger in banners]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        for logger in banners:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(banners, levels):
                logger.setLevel(level)
