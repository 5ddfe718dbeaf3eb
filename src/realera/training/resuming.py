"""The loop's checkpoints: when they are written, what stands in them, and which one a run goes on from."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from realera import finite, seals
from realera.contracts import UserError
from realera.paths import whole
from realera.training.module import REMEDY

log = logging.getLogger(__name__)

LAST = "last.ckpt"


class Checkpoints(Callback):
    """Keeps the loop's latest state in `file`, stamped with the run it belongs to: what is trained, the optimiser's
    state of it, and nothing that comes back from elsewhere. It stands last among the callbacks.

    every: steps from one to the next; None = `OFTEN`, or `SELDOM` where more than `LARGE` numbers are trained, which
    take minutes to write (a whole U-Net of Stable Diffusion: 10 GB). Raises UserError for steps that cannot be.
    """

    OFTEN, SELDOM, LARGE = 25, 250, 50_000_000

    def __init__(self, file: Path, identity: str, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise UserError(f"trainer.checkpoint_every={every} cannot be: give a number of steps from 1 on, or null.")
        self.file = file
        self.identity = identity
        self.every = every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every is None:
            self.every = self.OFTEN if trained_numbers(trainer) <= self.LARGE else self.SELDOM

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = self.identity

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.every is not None
        if trainer.global_step % self.every == 0:
            finite.refuse(_kept(trainer, pl_module), f"After step {trainer.global_step}", REMEDY)
            trainer.save_checkpoint(self.file)


class KeepsAnswer(Callback):
    """SIGTERM stays what it was: Lightning's own answer waits for all processes, of which some may not have had it."""

    def __init__(self) -> None:
        self.answer = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.answer is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.answer)


class WholeFiles(TorchCheckpointIO):
    """Lightning writes to the system's temporary folder and moves, which is a copy across file systems: it can be cut
    short."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with whole(Path(path)) as beside:
            with beside.open("wb") as stream:  # whose errors say more than torch's own
                torch.save(checkpoint, stream)
            seals.close_archive(beside)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """As data alone, whatever the caller says: the folder may have come from somebody else."""
        loaded: dict[str, Any] = super().load_checkpoint(path, map_location or (lambda storage, _: storage), True)
        return loaded


def last_good(file: Path, identity: str) -> Path | None:
    """The checkpoint to go on from; None where there is none, or one that the disk has torn: the loop starts again.
    torch.load itself compares none of the checksums in the zip archive that torch.save writes."""
    if not file.is_file():
        return None
    try:
        if not seals.archive_is_whole(file):
            raise seals.Torn(f"{file} is torn")
        content = torch.load(file, map_location="cpu", weights_only=True)
        stamped, bad = content["identity"], finite.first_bad(content["state_dict"])
    except Exception:  # of damaged bytes its reader says whatever comes to it: dozens of classes
        seals.made_again(file)
        return None
    same_run(stamped, identity, file)
    if bad is not None:
        log.warning("%s holds NaN or infinity (%s): the loop starts again", file, bad)
        return None
    return file


def same_run(found: str, identity: str, file: Path) -> None:
    """Raises UserError for a file of another run."""
    if found != identity:
        raise UserError(f"{file} belongs to a run with other settings: set overwrite=true, or another run_dir.")


def _kept(trainer: Trainer, module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of numbers: the trained weights, and what the optimiser knows of them."""
    yield from ((name, value) for name, value in module.named_parameters() if value.requires_grad)
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from ((f"the optimiser's {name}", v) for name, v in state.items() if isinstance(v, Tensor))


def trained_numbers(trainer: Trainer) -> int:
    """How many numbers the optimiser was given to change."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return sum(p.numel() for group in groups for p in group["params"])
