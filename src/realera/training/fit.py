"""One function from a method to erased weights, whatever parts the method has."""

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
from realera.files.checksums import fit_stands
from realera.files.finite import NotFinite
from realera.paths import ERASED, FIT, cache_dir
from realera.settings.command_settings import OURS
from realera.training.callbacks import ClosedFormEdit, FitProgress, Measured, PrepareLatents
from realera.training.checkpoint import Origin, load_erased, save_erased
from realera.training.losses import LossLines
from realera.training.module import ErasureModule, clip_of, steps_of, trains
from realera.training.resuming import Checkpoints, KeepsAnswer, same_run

log = logging.getLogger(__name__)

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # all keep the trained weights in float32


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

    A run folder that has that file already is loaded, not redone, unless it or a file that belongs to it is torn. A run
    that was killed in the loop goes on from its last checkpoint (see `Checkpoints` for `checkpoint_every`) and ends
    with the same weights, bit for bit on the CPU.

    config: the resolved settings, kept in the files' metadata. identity: a hash of the settings that decide the result;
    files of another identity in `run_dir` are refused. trainer: keywords of lightning.Trainer (accelerator, devices,
    strategy, precision, ...), and gradient_clip_val: a norm, None = no clipping, "method" = what the method says.
    Several processes that have found each other (torch.distributed is initialised) all call this, or Lightning starts
    them; a method without a loop is one process's work. probes: prompts whose shift under the edit goes into edit.json.
    meter: told of the stages edit, latents, train and finish.

    Raises:
        UserError: settings that cannot run together, and files in `run_dir` that belong to another run.
    """
    align = method.align
    if trains(align) and method.latents is None:
        raise UserError(
            f"method {method.name} trains (align) on no latents: give it a `latents` part, or set method.align=null."
        )
    origin = Origin(config, backbone.name, backbone.fingerprint, identity)
    erased = run_dir / ERASED
    if fit_stands(erased):
        same_run(load_erased(erased, backbone).origin.identity, identity, erased)
        log.info("%s is there already: loaded, not fitted again", erased)
        shutil.rmtree(run_dir / FIT, ignore_errors=True)  # of a process that was killed once the weights were saved
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
        KeepsAnswer(),
    ]
    with _quiet():
        runner = _trainer(settings, steps, run_dir, loggers, around)
        with _without_checkpoint(run_dir, runner):
            try:
                runner.fit(module)
            except SystemExit:
                if runner.interrupted:  # Lightning turns Ctrl-C into an exit status of its own
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
            f"trainer.precision={settings['precision']} is not known here: choose one of {', '.join(PRECISIONS)}."
        )
    if steps == 0:  # nothing for several processes to share, and DDP refuses a model without gradients
        devices = settings.get("devices")
        settings |= {"devices": devices[:1] if isinstance(devices, list) else 1, "num_nodes": 1, "strategy": "auto"}
    if settings.get("strategy") == "ddp":
        # Attention losses leave the layers behind the last map without a gradient. A gradient of zeros instead, which
        # DDP would not have to look for, is no remedy: AdamW's decay would move what stands still in one process.
        settings["strategy"] = "ddp_find_unused_parameters_true"
    # Processes that have found each other are numbered by RANK, whatever a scheduler around them says. Slurm's own
    # environment would also ask to be started once more, at a signal, and the same command goes on anyway.
    found = torch.distributed.is_available() and torch.distributed.is_initialized()
    met = [LightningEnvironment()] if found or SLURMEnvironment.detect() else []
    try:
        return Trainer(
            max_steps=steps,
            default_root_dir=run_dir,
            logger=list(loggers) or False,
            callbacks=callbacks,
            plugins=[*met],
            enable_checkpointing=False,  # `Checkpoints` does
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **settings,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"These trainer settings cannot run ({reason}): try trainer=default.") from error


@contextmanager
def _without_checkpoint(run_dir: Path, runner: Trainer) -> Iterator[None]:
    """Where it ends in NaN, the loop's checkpoint goes: it was on the way there, and nothing is to go on from it."""
    try:
        yield
    except NotFinite:
        if runner.is_global_zero:
            shutil.rmtree(run_dir / FIT, ignore_errors=True)
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice on loaders and its banners: the log has a line per milestone."""
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
