"""The lines of losses.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from realera import foreign
from realera.disk import Tolerance, append
from realera.paths import LOSSES, json_text, write_text


class LossLines(Callback):
    """A line a step in losses.jsonl. A checkpoint holds the lines up to it, so a run that goes on from it has every
    step once, whatever was written after it and whatever became of the file. Lines that the disk does not take wait for
    the next one: no training ends for them."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / LOSSES
        self.lines: list[str] = []
        self.waiting: list[str] = []
        self.tolerance = Tolerance()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["losses"] = "\n".join(self.lines)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "losses" in checkpoint:
            self.lines = checkpoint["losses"].splitlines()
        else:  # one of an earlier version
            self.lines = [line for line in _lines(self.file) if _step(line) <= checkpoint["global_step"]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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


def _lines(file: Path) -> list[str]:
    """The lines a killed run left."""
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []


def _step(line: str) -> float:
    """Infinity for a line that is torn."""
    try:
        return float(foreign.json_of(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
