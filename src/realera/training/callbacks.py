"""Callbacks of the training loop: the closed-form edit, the preparation of latents, the time, the progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from realera.contracts import Prepares, PreparesTogether
from realera.costs import Meter
from realera.files.cache_costs import collect_costs
from realera.paths import printable
from realera.system.ranks import ONE_PROCESS, Ranks, patient_group
from realera.system.terminal import bars_hidden
from realera.training.editing import Editing
from realera.training.module import ErasureModule
from realera.training.resuming import trained_numbers
from realera.training.schedule import trains


class ClosedFormEdit(Callback):
    """Applies the closed form in `setup`, before Lightning restores a checkpoint and builds the optimiser: after
    restoring, a resumed run would apply its edit to edited weights. After training, it applies the `finish` edit."""

    def __init__(self, editing: Editing) -> None:
        self.editing = editing

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.editing.before_training(trainer.loggers, trainer.is_global_zero)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.editing.after_training(trainer.is_global_zero)


class PrepareLatents(Callback):
    """Prepares the latent source and the aligner on the device, if they are `Prepares`. The first process does so
    first, and the others find the results in the cache. Parts that are `PreparesTogether` follow, in all processes at
    once."""

    def __init__(self, cache: Path, meter: Meter | None = None) -> None:
        self.cache = cache
        self.meter = meter or Meter()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _erasure(pl_module)
        module.backbone.to(trainer.strategy.root_device)  # Lightning has moved the trained network alone
        parts: tuple[object, ...] = (module.method.latents, module.method.align)
        together = [part for part in parts if isinstance(part, PreparesTogether)]
        alone = [part for part in parts if not isinstance(part, PreparesTogether) and isinstance(part, Prepares)]
        if (alone or together) and trains(module.method.align):
            given = (module.backbone, module.pairs, self.cache, module.seed)
            with self.meter.stage("latents"), collect_costs() as found, _patient(trainer) as ranks:
                for first in (True, False):
                    for part in alone if ranks.first == first else ():
                        part.prepare(*given)
                    ranks.wait()
                for shared in together:
                    shared.prepare(*given, ranks=ranks)
                self.meter.reused("latents", found)
        module.backbone.park()


class Measured(Callback):
    """Measures the time of the training loop and the number of trained parameters."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.note(trained_parameters=trained_numbers(trainer))
        self.meter.begin("train")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.end("train")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.meter.end("train")


class FitProgress(Callback):
    """A progress bar over the training steps that also shows the loss."""

    def __init__(self, description: str) -> None:
        self.description = printable(description)
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps  loss {task.fields[loss]}"),
                TimeRemainingColumn(),
                disable=bars_hidden(),
            )
            self.bar.start()
            self.task = self.bar.add_task(
                self.description, total=trainer.max_steps, completed=trainer.global_step, loss="..."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step, loss=f"{float(outputs['terms']['loss']):.2e}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


@contextmanager
def _patient(trainer: Trainer) -> Iterator[Ranks]:
    """The run's processes, with a group whose time limit is long enough for the preparation of latents."""
    if trainer.world_size == 1:
        yield ONE_PROCESS
        return
    group = patient_group()
    yield Ranks(trainer.global_rank, trainer.world_size, trainer.local_rank, group=group)
    torch.distributed.destroy_process_group(group)


def _erasure(module: LightningModule) -> ErasureModule:
    assert isinstance(module, ErasureModule)
    return module
