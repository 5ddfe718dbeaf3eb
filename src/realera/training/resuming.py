"""Training checkpoints: when they are written, and how a run resumes from one."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from realera import paths
from realera.contracts import Resumes, UserError
from realera.files import finite
from realera.training import saved
from realera.training.losses import LossLines
from realera.training.module import FIRST_SCALE, REMEDY, ErasureModule
from realera.training.per_concept_adamw import PerConceptAdamW
from realera.training.schedule import steps_per_concept

log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Saves the latest training state in the run's folder (`saved.Saved`), with the identity of the run, and resumes
    from it. This must be the last callback, because it restores states that the others have prepared.

    losses: its lines are part of a checkpoint. every: steps between two checkpoints; None = `OFTEN`, or `SELDOM` if
    more than `LARGE` parameters are trained, which take minutes to write (a whole U-Net of Stable Diffusion: 10 GB).
    Raises UserError for an invalid number of steps.
    """

    OFTEN, SELDOM, LARGE = 25, 250, 50_000_000

    def __init__(self, run_dir: Path, identity: str, losses: LossLines, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise UserError(f"trainer.checkpoint_every={every} is not possible: give 1 step or more, or null.")
        self.run_dir = run_dir
        self.file = run_dir / paths.LAST_CHECKPOINT
        self.identity = identity
        self.losses = losses
        self.every = every
        self.there = False

    def look(self) -> None:
        """Checks for a checkpoint. Call it before any work is done. Raises UserError as `saved.last_good`."""
        self.there = saved.last_good(self.run_dir, self.identity)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All processes read the same checkpoint: the next one is written only after all have started."""
        module = _erasure(pl_module)
        if self.there and trainer.optimizers:
            try:
                found = saved.read(self.file, form_of(trainer, module), steps_per_concept)
            except (ValueError, OSError, UserError) as error:
                log.warning("%s cannot be resumed by this run (%s): training starts again", self.file, error)
                return
            log.info("resuming from %s", self.file)
            _restore(found, trainer, module)
            self.losses.go_on(trainer, found.losses)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every is None:
            self.every = self.OFTEN if trained_numbers(trainer) <= self.LARGE else self.SELDOM

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.every is not None
        if trainer.global_step % self.every == 0:
            module = _erasure(pl_module)
            finite.refuse(_saved_tensors(trainer, module), f"After step {trainer.global_step}", REMEDY)
            if trainer.is_global_zero:
                saved.write(self.file, self.identity, state_of(trainer, module, self.losses.lines))
            trainer.strategy.barrier("checkpoint")


class KeepSignalHandler(Callback):
    """Keeps our handler of SIGTERM. Lightning's own would wait for all processes, and some may not get the signal."""

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)


def form_of(trainer: Trainer, module: ErasureModule) -> saved.Form:
    """The names, shapes and ranges that a checkpoint of this run must have."""
    (optimizer,) = trainer.optimizers
    latents: Any = module.method.latents
    scaler = _scaler(trainer)
    return saved.Form(
        steps=trainer.max_steps,
        weights=module.trained(),
        trained=_parameters(optimizer),
        concepts=optimizer.concepts if isinstance(optimizer, PerConceptAdamW) else 1,
        latents=lambda step: latents.state_form(steps_per_concept(step, len(module.pairs))) if keeps(latents) else {},
        scale=None if scaler is None else (FIRST_SCALE, scaler.get_growth_interval()),
    )


def state_of(trainer: Trainer, module: ErasureModule, losses: list[str]) -> saved.Saved:
    (optimizer,) = trainer.optimizers
    latents: Any = module.method.latents
    scaler = _scaler(trainer)
    state = {} if scaler is None else scaler.state_dict()
    return saved.Saved(
        step=trainer.global_step,
        weights=module.trained(),
        moments={i: optimizer.state[p] for i, p in enumerate(_parameters(optimizer)) if optimizer.state.get(p)},
        latents=latents.state_dict() if keeps(latents) else {},
        losses=losses,
        scale=(float(state["scale"]), int(state["_growth_tracker"])) if state else None,
    )


@torch.no_grad()
def _restore(found: saved.Saved, trainer: Trainer, module: ErasureModule) -> None:
    """Restores weights, moments, latents, scale and step. Hyperparameters and learning rates come from the method."""
    for name, parameter in module.trained().items():
        parameter.copy_(found.weights[name])
    latents: Any = module.method.latents
    if keeps(latents):
        latents.load_state_dict(found.latents, steps_per_concept(found.step, len(module.pairs)))
    (optimizer,) = trainer.optimizers
    optimizer.load_state_dict({"state": found.moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for config in trainer.lr_scheduler_configs:
        assert isinstance(config.scheduler, LambdaLR)
        config.scheduler = LambdaLR(optimizer, config.scheduler.lr_lambdas, last_epoch=found.step - 1)  # steps once
    scaler = _scaler(trainer)
    if scaler is not None and found.scale is not None:
        scale, tracker = found.scale
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": tracker})
    done = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    done.ready = done.completed = found.step


def keeps(latents: Any) -> bool:
    """Whether a latent source has a state that carries over from step to step."""
    return isinstance(latents, Resumes)


def _scaler(trainer: Trainer) -> Any:
    """The loss scaler of 16-mixed; None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _erasure(module: LightningModule) -> ErasureModule:
    assert isinstance(module, ErasureModule)
    return module


def _saved_tensors(trainer: Trainer, module: ErasureModule) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a checkpoint's trained weights and optimiser states."""
    yield from module.trained().items()
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from ((f"the optimiser's {name}", v) for name, v in state.items() if isinstance(v, Tensor))


def trained_numbers(trainer: Trainer) -> int:
    """The number of trained parameters."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return sum(p.numel() for group in groups for p in group["params"])
