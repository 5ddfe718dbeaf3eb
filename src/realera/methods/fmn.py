"""FMN (Forget-Me-Not, arXiv 2303.17591): suppresses the U-Net's cross-attention to a concept's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor

from realera.contracts import Backbone, LoraSpec, Miner, Pair, TextStates, TrainingBatch, UserError
from realera.methods.inversion import TextualInversion
from realera.methods.texts import need_attention_maps, predict, take
from realera.setting_types import LearningRate, NonNegative, Targets, TrainingSteps

Pooler = Literal["none", "eos", "pads"]


class AttentionResteering:
    """The norm of all cross-attention probabilities at the concept's token positions, over all layers, heads and
    pixels: one norm for all layers, averaged over the latents.

    parameters: the U-Net weights to train, as `Backbone.unfreeze` takes them. pooler: the rows that count besides the
    concept's own sub-tokens: "eos" = the first end-of-text row (official: use_pooler, on SD 2.1), "pads" = all rows
    from there on (the same code on SD 1.x, whose pads are end-of-text tokens too), "none". inversion: learns token
    vectors that replace the concept's name; None, or 0 steps, keeps the name. steps, lr, weight_decay: of AdamW.
    """

    lora: LoraSpec | None = None
    reads_attention = True

    def __init__(
        self,
        parameters: Targets = ("all",),
        steps: TrainingSteps = 35,
        lr: LearningRate = 2e-6,
        weight_decay: NonNegative = 0.01,
        pooler: Pooler = "eos",
        inversion: TextualInversion | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.pooler = pooler
        self.inversion = inversion if inversion is not None and inversion.steps > 0 else None
        self.found: dict[str, TextStates] = {}  # {concept: its prompt with the learned vectors}

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Runs the inversion of every concept, or loads its result from the cache."""
        if self.inversion is not None:
            prompts = self.inversion(backbone, pairs, cache, seed)
            self.found = {pair.concept.target: prompt for pair, prompt in zip(pairs, prompts, strict=True)}

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"attention"}. known: "prompts" (B,), the index of the prompt that each image was drawn from."""
        latents, timesteps, known = batch.latents, batch.timesteps, batch.known
        need_attention_maps(backbone, "fmn")
        texts = pair.target
        if self.inversion is not None:
            texts, prompts = self.found[pair.concept.target], torch.zeros(len(latents), dtype=torch.int64)
        elif "prompts" in known:
            prompts = known["prompts"]
        else:
            raise UserError("method fmn needs the prompts of its latents: set method.latents.give='[noise,prompts]'.")
        texts = take(texts, prompts)
        counted = positions(texts, self.pooler).to(latents.device)[:, None, None]
        with backbone.attention() as maps:
            predict(backbone, latents, timesteps, texts)
            squares = [torch.where(counted, found.float(), 0).square().sum(dim=(1, 2, 3)) for found in maps.values()]
        attention = torch.stack(squares).sum(dim=0).sqrt().mean()
        return {"attention": attention}


def positions(texts: TextStates, pooler: Pooler) -> Tensor:
    """(B, T) bool: the rows of each text that count as the concept's."""
    rows = torch.arange(texts.states.shape[1], device=texts.first.device)
    first, last, end = (row[:, None] for row in (texts.first, texts.last, texts.length))
    own = (rows >= first) & (rows <= last)
    return {"none": own, "eos": own | (rows == end), "pads": own | (rows >= end)}[pooler]
