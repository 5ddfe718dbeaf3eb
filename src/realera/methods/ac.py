"""AC (Concept Ablation, arXiv 2303.13516): on images of the anchor, the concept's prompt is taught to give the noise
that the anchor's gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from realera.contracts import Backbone, LoraSpec, Miner, Pair, TrainingBatch, UserError
from realera.methods.texts import predict, take
from realera.setting_types import LearningRate, NonNegative, Targets, TrainingSteps

Variant = Literal["model", "noise"]


class Ablation:
    """|| eps(z_t, t, p_c) - y ||^2, a mean for the norm, on noised images of the anchor's prompt p_a; p_c is the same
    prompt with the concept in place of the anchor.

    variant: "model" = y is eps(z_t, t, p_a) of the model as it is being trained, without gradient (the paper's
    equation 5, as in its code); "noise" = y is the noise in z_t (equation 4). prior: weight of || eps(z_t, t, p_a) -
    the noise in z_t ||^2, for concepts that lie within their anchor (the code takes other images of the same kind for
    it). parameters: which of the U-Net's weights are trained, as `Backbone.unfreeze` takes it. detach_bos: keys and
    values of BOS, the same in all prompts, give the weights no gradient, as in the official code. steps, lr,
    weight_decay: of AdamW.
    """

    lora: LoraSpec | None = None

    def __init__(
        self,
        parameters: Targets,
        steps: TrainingSteps = 100,
        lr: LearningRate = 1.6e-5,
        weight_decay: NonNegative = 0.01,
        variant: Variant = "model",
        prior: NonNegative = 0.0,
        detach_bos: bool = True,
    ) -> None:
        self.parameters = list(parameters)
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.noise_based = variant == "noise"
        self.prior = float(prior)
        self.detach_bos = detach_bos

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"ablate"}, with `prior` {"prior"} too; known: the noise (B, C, h, w) in z_t, the numbers (B,) of its
        prompts."""
        latents, timesteps, known = batch.latents, batch.timesteps, batch.known
        if lacking := [name for name in ("noise", "prompts") if name not in known]:
            raise UserError(
                f"method ac has to know the {lacking[0]} of its latents: set method.latents.give='[noise,prompts]'."
            )
        noise = known["noise"].float()
        p_c, p_a = (take(texts, known["prompts"]) for texts in (pair.target, pair.anchor))
        terms: dict[str, Tensor] = {}
        with _detached_bos(backbone) if self.detach_bos else nullcontext():
            target = noise
            # A pass for each text, of the same shape, so that the same text gives the same noise to the last bit.
            if self.prior > 0 or not self.noise_based:
                with nullcontext() if self.prior > 0 else torch.no_grad():
                    anchored = predict(backbone, latents, timesteps, p_a)
                if self.prior > 0:
                    terms["prior"] = self.prior * mse_loss(anchored, noise)
                if not self.noise_based:
                    target = anchored.detach()
            return {"ablate": mse_loss(predict(backbone, latents, timesteps, p_c), target), **terms}


@contextmanager
def _detached_bos(backbone: Backbone) -> Iterator[None]:
    """Row 0 of keys and values without gradient, in what is computed within."""
    if getattr(
        backbone.denoiser, "is_gradient_checkpointing", False
    ):  # computes again where nothing is detached any more
        raise UserError(
            "method.align.detach_bos cannot be kept with backbone.gradient_checkpointing: set one of them to false."
        )

    def detach(layer: nn.Module, inputs: object, out: Tensor) -> Tensor:
        return torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1)

    hooks = [layer.register_forward_hook(detach) for layer in backbone.text_projections().values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
