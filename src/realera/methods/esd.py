"""ESD (arXiv 2303.07345): the model is taught to lead away from the concept, as negative guidance by the original model
would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from realera.contracts import Backbone, LoraSpec, Miner, Pair, TextStates, TrainingBatch
from realera.methods.texts import predict, repeat
from realera.setting_types import Finite, LearningRate, NonNegative, Positive, Targets, TrainingSteps

NORMS = ("-norm", "-norm1", "-norm2", "-norm3", "-conv_norm_out")  # the layers' names in every Stable Diffusion


class NegativeGuidance:
    """|| eps(z_t, t, c) - (eps0(z_t, t, '') - eta (eps0(z_t, t, c) - eps0(z_t, t, ''))) ||^2, a mean for the norm.

    c is the bare name of the concept; the anchor plays no part. eps0 is the original model. negative_guidance: eta.
    parameters: which of the U-Net's weights are trained, as `Backbone.unfreeze` takes it. norms: whether the
    normalisations among them are. steps, lr, weight_decay: of AdamW, which with a decay of 0 is Adam. clip: the norm
    that the gradient is held under, None = unbounded.
    """

    lora: LoraSpec | None = None

    def __init__(
        self,
        parameters: Targets,
        steps: TrainingSteps = 1000,
        lr: LearningRate = 1e-5,
        weight_decay: NonNegative = 0.0,
        negative_guidance: Finite = 1.0,
        norms: bool = True,
        clip: Positive | None = None,
    ) -> None:
        self.parameters = [*parameters, *(() if norms else NORMS)]
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.negative_guidance = negative_guidance
        self.clip = clip
        self.texts: dict[str, TextStates] = {}

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Encodes the names, and no text at all."""
        self.texts = {text: backbone.encode([text]) for text in ["", *(pair.concept.target for pair in pairs)]}

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"erase"}"""
        latents, timesteps = batch.latents, batch.timesteps
        c, nothing = (repeat(self.texts[text], 0, len(latents)) for text in (pair.concept.target, ""))
        # Not in one pass of two texts: another batch rounds otherwise, and where c is '' all three must be the same.
        with torch.no_grad(), backbone.original():
            away = predict(backbone, latents, timesteps, nothing)
            towards = predict(backbone, latents, timesteps, c)
        target = away - self.negative_guidance * (towards - away)
        return {"erase": mse_loss(predict(backbone, latents, timesteps, c), target)}
