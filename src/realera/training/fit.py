"""`fit`: edits and trains a backbone with a method, for any combination of parts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from realera.contracts import Backbone, Method, Pair, Prompt, UserError
from realera.costs import Meter
from realera.files.checksums import fit_is_intact
from realera.paths import ERASED, FIT, cache_dir
from realera.training import saved
from realera.training.checkpoint import Origin, load_erased, save_erased
from realera.training.editing import Editing
from realera.training.schedule import clip_of, steps_of, trains

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)

# The trainer's settings that are only for training, which include how many processes share it.
FOR_TRAINING = {"devices", "gradient_clip_val", "log_every_n_steps", "num_nodes", "precision", "strategy"}


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
    lightning: bool = True,
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
    meter: measures the stages edit, latents, train and finish. lightning: False = a method that trains nothing is
    carried out without Lightning, whose import takes a second, unless loggers, callbacks or a setting of the trainer
    need it. The result is the same, bit for bit.

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
        saved.same_run(load_erased(erased, backbone).origin.identity, identity, erased)
        log.info("%s already exists: loaded, not trained again", erased)
        shutil.rmtree(run_dir / FIT, ignore_errors=True)  # left by a process that was killed after saving the weights
        return erased

    meter = meter or Meter()
    if steps_of(align, len(pairs)) == 0:
        meter.note(trained_parameters=0)
    editing = Editing(
        backbone,
        method,
        pairs,
        seed,
        run_dir=run_dir,
        origin=origin,
        probes=probes,
        keep_neighbours=keep_neighbours,
        meter=meter,
    )
    asked = dict(trainer or {})
    if not (lightning or trains(align) or loggers or callbacks or _needs_lightning(asked)):
        clip_of(align)  # refuses a wrong setting, as the training does
        saved.last_good(run_dir, identity)
        editing.before_training()
        backbone.park()
        editing.after_training()
        runner = None
    else:
        from realera.training import loop

        runner = loop.run(
            editing,
            cache=cache_dir() if cache is None else cache,
            checkpoint_every=checkpoint_every,
            trainer=asked,
            loggers=loggers,
            callbacks=callbacks,
        )
    if runner is None or runner.is_global_zero:
        lora = align.lora if align is not None and trains(align) and method.finish is None else None
        with meter.stage("finish"), saved.without_checkpoint(run_dir):
            save_erased(erased, backbone, origin, lora)
        shutil.rmtree(run_dir / FIT, ignore_errors=True)
    if runner is not None:
        runner.strategy.barrier("erased")
    return erased


def _needs_lightning(trainer: Mapping[str, Any]) -> bool:
    """Whether a setting matters, or is an error, even if nothing is trained: determinism, a GPU that is not there."""
    on_gpu = trainer.get("accelerator", "auto") in ("gpu", "cuda")
    return bool(set(trainer) - FOR_TRAINING - {"accelerator"}) or (on_gpu and not torch.cuda.is_available())
