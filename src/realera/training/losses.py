"""Writes losses.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from realera.files.plain_data import json_text
from realera.paths import LOSSES
from realera.system.disk import Tolerance, append, write_text


class LossLines(Callback):
    """Writes one line for each step to losses.jsonl. A checkpoint contains all lines up to its step, so after resuming
    the file has every step once, even if it was changed or lost. Lines that cannot be written are kept and written with
    the next one; training continues."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / LOSSES
        self.lines: list[str] = []
        self.waiting: list[str] = []
        self.tolerance = Tolerance()

    def go_on(self, trainer: Trainer, lines: Sequence[str]) -> None:
        """Resumes after the steps of these lines. The file is written at once, because a finished loop does not start
        again."""
        self.lines = list(lines)
        self.on_train_start(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule | None = None) -> None:
        if trainer.is_global_zero:
            write_text(self.file, "".join(f"{line}\n" for line in self.lines))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            values = {name: float(value) for name, value in outputs["terms"].items()}
            self.lines.append(json_text({"step": trainer.global_step, **values}))
            self.waiting.append(f"{self.lines[-1]}\n")
            with self.tolerance:
                append(self.file, "".join(self.waiting))
                self.waiting.clear()
