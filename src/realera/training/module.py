"""The training loop of all methods, as one LightningModule."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from realera.contracts import Backbone, Method, Pair, Scheduled, TrainingBatch, UserError
from realera.files import finite
from realera.method_roles import TrainsNetwork
from realera.training.pairs import on_cpu
from realera.training.per_concept_adamw import PerConceptAdamW
from realera.training.schedule import concept_of_step, has_adapter_per_concept, part_of, step_of_concept, trains
from realera.training.seeding import stream

log = logging.getLogger(__name__)

BETAS = (0.9, 0.999)
FIRST_SCALE = 2.0**16  # initial loss scale in 16-mixed: GradScaler's default
REMEDY = "lower method.align.lr, or set trainer.precision=32-true"  # for training that ended in NaN or infinity


class ErasureModule(LightningModule):
    """Minimises the sum of the terms of `method.align`, one concept per step, on latents from `method.latents`.

    Only the trained network is registered as a submodule, so Lightning moves and DDP wraps only it. The random numbers
    of a step depend only on the seed and the step. Every process draws the same batch and takes its part of it
    (`part_of`), so the mean of the gradients is that of a single process, and the result is the same for any number of
    processes, up to rounding. An aligner must therefore return terms that are means over the latents, and draw the same
    random numbers for any number of latents.
    """

    def __init__(self, backbone: Backbone, method: Method, pairs: Sequence[Pair], seed: int) -> None:
        super().__init__()
        part: object = method.align
        backbone.choose(part.network if isinstance(part, TrainsNetwork) else "denoiser")
        self.network = backbone.trained
        self.backbone = backbone
        self.method = method
        self.pairs = [on_cpu(pair) for pair in pairs]
        self.seed = seed

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        align, latents = self.method.align, self.method.latents
        assert align is not None and latents is not None
        step = self.trainer.global_step + 1  # the data loader counts from 0 again after resuming
        concept = concept_of_step(step, len(self.pairs))
        with self._own_adapter(concept):
            z_t, timesteps, *more = latents(self.backbone, concept, stream(self.seed, "latents", step, 0))
        world = self.trainer.world_size
        if step == 1 and world > math.gcd(len(z_t), world) and self.global_rank == 0:
            log.info(
                "%d processes cannot split a batch of %d evenly: each part is computed by %d processes; "
                "method.latents.batch=%d can be split",
                *(world, len(z_t), world // math.gcd(len(z_t), world), world),
            )
        part = part_of(len(z_t), self.global_rank, world)
        with self._own_adapter(concept):
            terms = align.loss(
                self.backbone,
                self.pairs[concept],
                self.method.neighbours,
                TrainingBatch(
                    z_t[part],
                    timesteps[part],
                    step,
                    {name: value[part] for known in more for name, value in known.items()},
                ),
                stream(self.seed, "align", step, 0),
            )
        loss = torch.stack([term for term in terms.values() if term.requires_grad]).sum()
        values = {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
        means = self.trainer.strategy.reduce(
            torch.stack([value.float() for value in values.values()]), reduce_op="mean"
        )
        values = dict(zip(values, means))
        if not means.isfinite().all():  # the mean is equal in all processes, so all stop and none waits for another
            own = {name: float(value) for name, value in values.items() if not value.isfinite()}
            name = next((name for name in own if name != "loss"), "loss")  # the loss is their sum
            raise finite.NotFinite(f"The loss ({name}) is {own[name]} at step {step}: {REMEDY}.")
        every = self.trainer.log_every_n_steps
        for logger in self.trainer.loggers if every and step % every == 0 else ():
            # log_dict would repeat a term's last value at the steps without this term.
            logger.log_metrics({f"train/{name}": float(value) for name, value in values.items()}, step=step)
        return {"loss": loss, "terms": values}

    def _own_adapter(self, concept: int) -> AbstractContextManager[None]:
        """If each concept has its own adapter: switches the others off inside this context."""
        if not has_adapter_per_concept(self.method.align) or len(self.pairs) == 1:
            return nullcontext()
        return self.backbone.adapter_scale(torch.eye(len(self.pairs))[concept : concept + 1])

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Uses the same adapter as the loss: gradient checkpointing recomputes parts of the forward pass here."""
        with self._own_adapter(concept_of_step(self.trainer.global_step + 1, len(self.pairs))):
            super().backward(loss, *args, **kwargs)

    def on_after_backward(self) -> None:
        self._refuse_bad_gradients()
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, PerConceptAdamW):
            optimizer.hand_over(concept_of_step(self.trainer.global_step + 1, len(self.pairs)))

    def _refuse_bad_gradients(self) -> None:
        """The gradients are already the mean over all processes, so all processes stop. In 16-mixed the scaler skips a
        step whose gradients are too large and halves the scale; with a scale below 1 they can only be NaN."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None or scaler.get_scale() < 1:
            gradients = ((name, p.grad) for name, p in self.named_parameters() if p.grad is not None)
            finite.refuse(gradients, f"At step {self.trainer.global_step + 1} the gradient of", REMEDY)

    def on_train_end(self) -> None:
        """In 16-mixed all steps may have been skipped without the scale getting below 1, if there were only a few."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        steps = self.trainer.global_step
        if scaler is not None and steps and scaler.get_scale() <= FIRST_SCALE / 2**steps:
            raise finite.NotFinite(
                f"In all {steps} steps a gradient was NaN or infinite, so all steps were skipped: {REMEDY}."
            )

    def configure_optimizers(self) -> Any:
        align = self.method.align
        if align is None or not trains(align):
            return []
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trained:
            raise UserError(
                "method.align has no parameters to train: give it a LoRA (method.align.lora), or set method.align=null."
            )
        settings: dict[str, Any] = {"lr": align.lr, "betas": BETAS, "weight_decay": align.weight_decay}
        concepts = len(self.pairs) if has_adapter_per_concept(align) else 1
        optimizer = AdamW(trained, **settings) if concepts == 1 else PerConceptAdamW(trained, concepts, **settings)
        if not isinstance(align, Scheduled):
            return [optimizer]
        follow = LambdaLR(optimizer, lambda done: align.rate(step_of_concept(done + 1, concepts)))
        return [optimizer], [{"scheduler": follow, "interval": "step"}]

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(_Steps(), batch_size=None)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name. All others follow from the backbone's files and the edit."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


class _Steps(IterableDataset[int]):
    """Endless counter as data set: Lightning needs batches, but the latent source supplies the data."""

    def __iter__(self) -> Iterator[int]:
        step = 0
        while True:
            yield step
            step += 1
