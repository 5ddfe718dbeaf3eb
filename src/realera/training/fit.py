"""`fit`: edits and trains a backbone with a method, for any combination of parts."""

from __future__ import annotations

import logging
import shutil
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

from realera.contracts import Backbone, Method, Pair, Prompt, UserError
from realera.costs import Meter
from realera.files.checksums import fit_is_intact
from realera.files.finite import NotFinite
from realera.paths import ERASED, FIT, cache_dir
from realera.settings.command_settings import OURS
from realera.training.callbacks import ClosedFormEdit, FitProgress, Measured, PrepareLatents
from realera.training.checkpoint import Origin, load_erased, save_erased
from realera.training.losses import LossLines
from realera.training.module import ErasureModule, clip_of, steps_of, trains
from realera.training.resuming import Checkpoints, KeepSignalHandler, same_run

log = logging.getLogger(__name__)

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # the trained weights are float32 in all of them


def fit(
    backbone: Backbone,
    method: Method,
    pairs: Sequence[Pair],
    *,
    run_dir: Path,
    seed: int,
    config: Mapping[str, Any],
    identity: str = "",
    trainer: Mapping[str, Any] | None = None,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
    probes: Sequence[Prompt] = (),
    cache: Path | None = None,
    checkpoint_every: int | None = None,
    keep_neighbours: bool = True,
    meter: Meter | None = None,
) -> Path:
    """Edits and trains `backbone` in place and returns run_dir/erased.safetensors.

    If `run_dir` already has this file, it is loaded and nothing is computed, unless it or a file that belongs to it is
    torn. A run that was killed while training resumes from its last checkpoint (see `Checkpoints` for
    `checkpoint_every`) and ends with the same weights, bit for bit on the CPU.

    config: the resolved settings, saved in the files' metadata. identity: a hash of the settings that decide the
    result; files of another identity in `run_dir` are refused. trainer: keywords of lightning.Trainer (accelerator,
    devices, strategy, precision, ...), and gradient_clip_val: a norm, None = no clipping, "method" = the method's norm.
    With several processes, all call this function after torch.distributed is initialised, or Lightning starts them; a
    method without training runs in one process. probes: prompts whose shift under the edit is written to edit.json.
    meter: measures the stages edit, latents, train and finish.

    Raises:
        UserError: settings that contradict each other, and files in `run_dir` that belong to another run.
    """
    align = method.align
    if trains(align) and method.latents is None:
        raise UserError(
            f"method {method.name} has an `align` part and no `latents` part: add `latents`, or set method.align=null."
        )
    origin = Origin(config, backbone.name, backbone.fingerprint, identity)
    erased = run_dir / ERASED
    if fit_is_intact(erased):
        same_run(load_erased(erased, backbone).origin.identity, identity, erased)
        log.info("%s already exists: loaded, not trained again", erased)
        shutil.rmtree(run_dir / FIT, ignore_errors=True)  # left by a process that was killed after saving the weights
        return erased

    checkpoints = Checkpoints(run_dir, identity, losses := LossLines(run_dir), checkpoint_every)
    checkpoints.look()
    meter = meter or Meter()
    steps = steps_of(align, len(pairs))
    settings = dict(trainer or {})
    if settings.get("gradient_clip_val", "method") == "method":
        settings["gradient_clip_val"] = clip_of(align)
    if steps == 0:
        meter.note(trained_parameters=0)
    module = ErasureModule(backbone, method, pairs, seed)
    around = [
        ClosedFormEdit(run_dir, origin, probes, keep_neighbours, meter),
        PrepareLatents(cache_dir() if cache is None else cache, meter),
        Measured(meter),
        losses,
        FitProgress(f"Aligning noise ({method.name})"),
        *callbacks,
        checkpoints,
        KeepSignalHandler(),
    ]
    with _quiet():
        runner = _trainer(settings, steps, run_dir, loggers, around)
        with _without_checkpoint(run_dir, runner):
            try:
                runner.fit(module)
            except SystemExit:
                if runner.interrupted:  # Lightning turns Ctrl-C into SystemExit
                    raise KeyboardInterrupt from None
                raise
    if runner.is_global_zero:
        lora = align.lora if align is not None and trains(align) and method.finish is None else None
        with meter.stage("finish"), _without_checkpoint(run_dir, runner):
            save_erased(erased, backbone, origin, lora)
        shutil.rmtree(run_dir / FIT, ignore_errors=True)
    runner.strategy.barrier("erased")
    return erased


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
def _without_checkpoint(run_dir: Path, runner: Trainer) -> Iterator[None]:
    """Deletes the checkpoint if training ends in NaN: resuming from it would lead to NaN again."""
    try:
        yield
    except NotFinite:
        if runner.is_global_zero:
            shutil.rmtree(run_dir / FIT, ignore_errors=True)
        raise


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
