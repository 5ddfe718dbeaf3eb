"""ESD (arXiv 2303.07345): the denoiser learns to steer away from the concept, as negative guidance with the original
model would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from realera.contracts import Backbone, LoraSpec, Miner, Pair, TextStates, TrainingBatch
from realera.methods.texts import predict, repeat
from realera.setting_types import Finite, LearningRate, NonNegative, Positive, Targets, TrainingSteps

NORMS = ("-*norm*",)  # in a U-Net norm, norm1, norm2, norm3 and conv_norm_out; in a transformer also its modulations


class NegativeGuidance:
    """|| eps(z_t, t, c) - (eps0(z_t, t, '') - eta (eps0(z_t, t, c) - eps0(z_t, t, ''))) ||^2, as a mean.

    c is the bare name of the concept. The anchor is not used. eps0 is the original model. negative_guidance: eta.
    parameters: the denoiser weights to train, as `Backbone.unfreeze` takes them. norms: whether to train the
    normalisation layers among them. steps, lr, weight_decay: of AdamW, which is Adam at weight_decay 0. clip: upper
    bound of the gradient's norm, None = unbounded.
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
        """Encodes the concepts' names and the empty prompt."""
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
        c, empty = (repeat(self.texts[text], 0, len(latents)) for text in (pair.concept.target, ""))
        # Not one pass with both texts: another batch size rounds differently, and if c is '' all three must be equal.
        with torch.no_grad(), backbone.original():
            uncond = predict(backbone, latents, timesteps, empty)
            cond = predict(backbone, latents, timesteps, c)
        target = uncond - self.negative_guidance * (cond - uncond)
        return {"erase": mse_loss(predict(backbone, latents, timesteps, c), target)}
