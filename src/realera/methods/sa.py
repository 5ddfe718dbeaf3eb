"""SA (Selective Amnesia, arXiv 2305.10120): the denoiser learns images of the anchor for the concept's prompt. Replay
images of other captions and elastic weight consolidation preserve the rest of the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from realera.contracts import Backbone, Concept, LoraSpec, Miner, Pair, Sampler, TextStates, TrainingBatch, UserError
from realera.methods.latents import AnchorBank, images_of, noised
from realera.methods.replay import Fisher, Replay
from realera.methods.texts import join, on_cpu, predict, take
from realera.setting_types import AnyText, Batch, Count, LearningRate, NonNegative, Positive, Targets, TrainingSteps
from realera.system.ranks import ONE_PROCESS, Ranks

log = logging.getLogger(__name__)

MANY = 16 * 512 * 512  # pixels in a training pass; twice as many took about 86 GiB in float32


class ForgetAndReplay:
    """Noised images of the anchor (the surrogate q(x|c)), each with one noised replay image of another caption.

    images, batch, chunk, sampler: of the surrogate, as in `AnchorBank`. surrogate: the texts to draw it from, {} = the
    anchor (official: a person's kind, "a middle aged man"); None = the anchor's training prompts. forget: the texts for
    which the denoiser learns the surrogate images, {} = the concept (official: the bare name; for nudity four words in
    turn); None = the concept's training prompts. Image i uses text i mod their number. replay: the other images.
    zip_replay: image i of the surrogate is paired with image i of the replay, so the longer list is cut (the official
    code); else both are drawn at random. Captions that name a concept are not replayed.
    """

    def __init__(
        self,
        replay: Replay,
        images: Count = 1000,
        batch: Batch = 16,
        chunk: Batch = 8,
        sampler: Sampler | None = None,
        zip_replay: bool = False,
        surrogate: Sequence[AnyText] | None = None,
        forget: Sequence[AnyText] | None = None,
    ) -> None:
        self.surrogate = AnchorBank(images, batch, chunk, sampler)
        self.replay = replay
        self.zip_replay = zip_replay
        self.kept = torch.zeros(0, dtype=torch.int64)  # indices of the replay images that are used
        self.texts = {"anchor": surrogate, "target": forget}
        self.forget: list[TextStates] = []  # of each concept, on the CPU

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        return images_of(settings, [concept.anchor for concept in concepts], steps)

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Draws or loads both banks. First warns if a training pass needs more memory than a GPU of 80 GB has."""
        size, count = backbone.sampler, 2 * self.surrogate.batch
        if count * size.height * size.width > MANY and not getattr(
            backbone.denoiser, "is_gradient_checkpointing", False
        ):
            log.warning(
                "a training pass has %d images of %d x %d pixels (split among the processes): on one GPU of 80 GB, set "
                "backbone.gradient_checkpointing=true or lower method.latents.batch",
                *(count, size.height, size.width),
            )
        given = [
            Pair(
                pair.concept,
                self._given(backbone, "target", pair.concept.target) or pair.target,
                self._given(backbone, "anchor", pair.concept.anchor) or pair.anchor,
            )
            for pair in pairs
        ]
        self.forget = [on_cpu(pair.target) for pair in given]
        self.surrogate.prepare(backbone, given, cache, seed)
        self.replay.prepare(backbone, cache, seed)
        self.kept = self.replay.without([pair.concept.target for pair in pairs])

    def _given(self, backbone: Backbone, side: str, name: str) -> TextStates | None:
        """The given texts of a side ("target" or "anchor"), encoded; None = its training prompts are used."""
        texts = self.texts[side]
        return backbone.encode([text.replace("{}", name) for text in texts]) if texts else None

    def __call__(
        self, backbone: Backbone, concept: int, generator: Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(z_t, t, known) of the surrogate. known: its noise, forget_states (B, T, D) = the texts to learn it for, and
        replay_latents, replay_timesteps, replay_noise, replay_states; for SDXL forget_pooled, replay_pooled (B, E)."""
        bank, count = self.surrogate.banks[concept], self.surrogate.batch
        both = min(len(bank), len(self.kept))
        chosen = torch.randint(both if self.zip_replay else len(bank), (count,), generator=generator)
        others = chosen if self.zip_replay else torch.randint(len(self.kept), (count,), generator=generator)
        others = self.kept[others]
        z_t, timesteps, noise = noised(backbone, bank, chosen, generator)
        z_r, t_r, noise_r = noised(backbone, self.replay.bank, others, generator)
        texts, forget = self.replay.read(others), self.forget[concept]
        forget = take(forget, chosen % len(forget.states))
        known = {
            "noise": noise,
            "forget_states": forget.states,
            "replay_latents": z_r,
            "replay_timesteps": t_r,
            "replay_noise": noise_r,
            "replay_states": texts.states,
        }
        pooled = {"forget_pooled": forget.pooled, "replay_pooled": texts.pooled}
        return z_t, timesteps, {**known, **{name: value for name, value in pooled.items() if value is not None}}


class SelectiveAmnesia:
    """Equation 8:  E ||e - eps(z_t, t, p_c)||^2  +  gamma E ||e_r - eps(z_r, t_r, p_r)||^2  +  lambda sum F (w - w0)^2

    with means in place of norms; z_t noised images of the anchor with noise e, p_c the concept's prompt, z_r noised
    images of another caption p_r, w0 the weights as loaded, F their Fisher information (fisher=None: no such term).

    parameters: the weights to train, as `Backbone.unfreeze` takes them; the sum is over these. gamma, lambda_ewc: as
    above. steps, lr, weight_decay: of AdamW. clip: upper bound of the gradient's norm, None = unbounded.
    """

    lora: LoraSpec | None = None
    together = True  # all processes compute the Fisher information

    def __init__(
        self,
        fisher: Fisher | None = None,
        parameters: Targets = ("all",),
        steps: TrainingSteps = 12500,
        lr: LearningRate = 1.6e-4,
        weight_decay: NonNegative = 0.01,
        gamma: NonNegative = 1.0,
        lambda_ewc: NonNegative = 50.0,
        clip: Positive | None = None,
    ) -> None:
        self.fisher = fisher
        self.parameters = list(parameters)
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.gamma = gamma
        self.lambda_ewc = lambda_ewc
        self.clip = clip
        self.information: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}

    def prepare(
        self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int, ranks: Ranks = ONE_PROCESS
    ) -> None:
        """Computes the Fisher information of the trained weights and stores their initial values, because a resumed run
        starts with changed weights."""
        if self.fisher is None or self.lambda_ewc == 0:
            return
        self.information = self.fisher(backbone, cache, seed, ranks)
        with backbone.original():  # no copies: the backbone keeps the original weights
            self.first = {n: w.detach() for n, w in backbone.trained.named_parameters() if n in self.information}

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"forget", "replay", "ewc"}, weighted; known: as `ForgetAndReplay` gives it."""
        latents, timesteps, known = batch.latents, batch.timesteps, batch.known
        if "replay_latents" not in known:
            raise UserError(
                "method sa needs replay images: set method.latents._target_=realera.methods.sa.ForgetAndReplay."
            )
        p_c, p_r = (
            replace(pair.target, states=known[f"{part}_states"], pooled=known.get(f"{part}_pooled"))
            for part in ("forget", "replay")
        )
        z_t = torch.cat([latents, known["replay_latents"]])
        t = torch.cat([timesteps, known["replay_timesteps"]])
        forget, replay = predict(backbone, z_t, t, join(p_c, p_r, latents.device)).chunk(2)
        terms = {
            "forget": mse_loss(forget, known["noise"].float()),
            "replay": self.gamma * mse_loss(replay, known["replay_noise"].float()),
        }
        if self.information:
            weights = dict(backbone.trained.named_parameters())
            moved = [(f * (weights[n] - self.first[n]).square()).sum() for n, f in self.information.items()]
            terms["ewc"] = self.lambda_ewc * torch.stack(moved).sum()
        return terms
