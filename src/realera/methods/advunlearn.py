"""AdvUnlearn (arXiv 2405.15234): the text encoder learns to steer away from the concept, as ESD's U-Net does, for
prompts that an attacker has put learned vectors into; prompts of other things keep their noise.

Letters: B latents of the concept, R retained prompts and S attack steps for each of them, k attack vectors, D text
width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from realera.contracts import (
    PASSES_OF_A_GRADIENT,
    Backbone,
    Concept,
    LoraSpec,
    Miner,
    NamedPrompt,
    Network,
    Pair,
    Scheduler,
    TextStates,
    TrainingBatch,
    UserError,
)
from realera.files.cache_costs import cached
from realera.methods.replay import named, read_captions
from realera.methods.rollout import Rollout
from realera.methods.texts import on_cpu, predict, repeat, take
from realera.setting_types import (
    AnyText,
    Batch,
    Count,
    File,
    Finite,
    Guidance,
    LearningRate,
    NonNegative,
    Number,
    Positive,
    SamplerSteps,
    Targets,
    TrainingSteps,
    Whole,
)

Place = Literal["prefix", "suffix"]
Tokens = Annotated[int, Number(1, 64, whole=True)]
RETAINED = "retained prompts"


class ForgetAndRetain:
    """z_t of the concept's name, of retained prompts and for the attack: images that the *original* model has drawn
    partway, with t uniform in the part of the noise levels that begins at that of z_t (as `Rollout`).

    retain: the prompts to preserve, a list or a text file with one on each line; None = the 108 captions of the
    package. Prompts that name an erased concept are left out. retained: R; 0 = none. attacks: S; warmup: steps of each
    concept without an attack. tokens: k. scheduler, steps, guidance_scale: of the sampler. batch: B. images: None =
    every z_t is drawn for its step (official); a number = so many images of each name, and of the retained prompts
    together, are drawn once, `chunk` at a time, and cached with all their stages; a step takes stages at random.

    Raises UserError for a list that is empty or names concepts only.
    """

    def __init__(
        self,
        retain: Sequence[AnyText] | File | None = None,
        retained: Whole = 5,
        attacks: Whole = 30,
        warmup: TrainingSteps = 200,
        tokens: Tokens = 1,
        scheduler: Scheduler = "ddim",
        steps: SamplerSteps = 50,
        guidance_scale: Guidance = 3.0,
        batch: Batch = 1,
        images: Count | None = None,
        chunk: Batch = 8,
    ) -> None:
        self.retain = read_captions(retain, "method.latents.retain")
        self.retained, self.attacks, self.warmup, self.tokens = retained, attacks, warmup, tokens
        self.batch, self.images, self.chunk = batch, images, chunk
        self.rollout = Rollout(scheduler, steps, guidance_scale, "original", "concept", "bin")
        self.banks: dict[int, Tensor] = {}  # (steps + 1, images, C, h, w) of each concept, the retained ones last
        self.calls: dict[int, int] = {}
        self.prompts: list[str] = []  # the retained ones
        self.words: list[str] = []

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        passes = 2.0 * int(settings.get("steps") or steps) * int(settings.get("images") or 0)
        names = [*(concept.target for concept in concepts), *([""] if settings.get("retained") else [])]
        return {f"stages {name}": passes for name in names} if passes else {}

    @staticmethod
    def passes(settings: Mapping[str, Any], steps: int) -> float:
        """Denoiser passes of a step: half of each image, with guidance, and what the aligner makes of the R + S latents
        that are given with each z_t: a teacher's pass and a gradient."""
        beside = int(settings.get("retained") or 0) + int(settings.get("attacks") or 0)
        drawn = 0 if settings.get("images") else int(settings.get("steps") or steps) * (1 + beside)
        return float(int(settings.get("batch") or 1) * (drawn + beside * (1 + PASSES_OF_A_GRADIENT)))

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Reads the texts, and draws or loads the images."""
        names = [pair.concept.target for pair in pairs]
        self.prompts = kept_prompts(self.retain, names) if self.retained else []
        self.rollout.prepare(backbone, pairs, cache, seed)
        with backbone.original():
            self.rollout.texts = [backbone.encode([name]) for name in names]
            if self.retained:
                self.rollout.texts.append(on_cpu(backbone.encode(self.prompts)))
        self.words = backbone.words() if self.attacks else []
        self.calls, self.banks = {}, {}
        if self.images is not None:
            for kind, title in enumerate([*names, RETAINED] if self.retained else names):
                self.banks[kind] = self._bank(backbone, kind, title, cache, seed)

    def __call__(
        self, backbone: Backbone, concept: int, generator: Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(z_t (B, C, h, w), t (B,), known). known: retain_latents (B, R, C, h, w), retain_timesteps (B, R) and
        retain_prompts (B, R), the indices of their texts; after the warm-up attack_latents (B, S, C, h, w),
        attack_timesteps (B, S) and attack_start (B, k, D), the vectors of random words."""
        self.calls[concept] = self.calls.get(concept, 0) + 1
        z_t, timesteps, _ = self._taken(backbone, concept, self.batch, generator)
        known: dict[str, Tensor] = {}
        if self.retained:
            found = self._taken(backbone, len(self.rollout.texts) - 1, self.batch * self.retained, generator)
            parts = (part.unflatten(0, (self.batch, self.retained)) for part in found)
            known |= dict(zip(("retain_latents", "retain_timesteps", "retain_prompts"), parts))
        if self.attacks and self.calls[concept] > self.warmup:
            z, t, _ = self._taken(backbone, concept, self.batch * self.attacks, generator)
            chosen = torch.randint(len(self.words), (self.batch * self.tokens,), generator=generator).tolist()
            start = torch.cat([backbone.token_vectors(self.words[i])[:1].cpu() for i in chosen])
            known |= {
                "attack_latents": z.unflatten(0, (self.batch, self.attacks)),
                "attack_timesteps": t.unflatten(0, (self.batch, self.attacks)),
                "attack_start": start.unflatten(0, (self.batch, self.tokens)),
            }
        return z_t, timesteps, known

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def state_form(self, calls: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], calls: Sequence[int]) -> None:
        self.calls = dict(enumerate(calls))

    def _taken(self, backbone: Backbone, kind: int, count: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(z (count, C, h, w), t (count,), the index of each one's text (count,))."""
        if self.images is None:
            self.rollout.batch = count
            return self.rollout.with_prompts(backbone, kind, generator)
        stops = torch.randint(self.rollout.steps, (count,), generator=generator)
        timesteps = self.rollout.timesteps_of(backbone, stops, generator)
        image = torch.randint(self.images, (count,), generator=generator)
        bank = self.banks[kind]
        z = bank[stops, image].to(next(backbone.denoiser.parameters()).device)
        return z, timesteps.to(z.device), image % len(self.rollout.texts[kind].states)

    def _bank(self, backbone: Backbone, kind: int, title: str, cache: Path, seed: int) -> Tensor:
        assert self.images is not None
        texts = self.rollout.texts[kind]
        device = next(backbone.denoiser.parameters()).device.type
        about = [backbone.fingerprint, device, title, self.rollout.settings, self.images, self.chunk, seed]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(texts.states.detach().float().cpu().contiguous().numpy().tobytes())
        file = cache / "stages" / f"{digest.hexdigest()[:16]}.safetensors"

        def make() -> Tensor:
            generator = Generator().manual_seed(seed)
            numbers = torch.arange(self.images or 0)
            parts = [self.rollout.all_stages(backbone, kind, part, generator) for part in numbers.split(self.chunk)]
            return torch.cat([part.cpu() for part in parts], dim=1)

        return cached(file, "stages", backbone, make)


class AdversarialUnlearning:
    """Equation 5 with means in place of norms and eps0, H0 the original denoiser's noise and text states:

        || eps0(z, t, H(c')) - (eps0(z, t, H0('')) - eta (eps0(z, t, H0(c)) - eps0(z, t, H0(''))) ) ||^2
        + retain_weight || eps0(z_r, t, H(r)) - eps0(z_r, t, H0(r)) ||^2,   r a retained prompt

    c' is the bare name c with k vectors before or behind it (`place`). They are found anew in each step, from the
    vectors of random words, by S steps of Adam on || eps0(z, t, H(c')) - eps0(z, t, H0(c)) ||^2, each on another z.
    During the warm-up c' is c. retain: as in `ForgetAndRetain`. parameters: the weights of the text encoders to train.
    attack_lr: of that Adam. attack: "pgd" = by the gradient, "fast" = by its sign. accumulate: the gradient of an
    attack step is added to those before it (the official code never clears it). negative_guidance: eta. steps, lr,
    weight_decay: of AdamW, which is Adam at weight_decay 0. clip: upper bound of the gradient's norm, None = unbounded.
    """

    lora: LoraSpec | None = None
    network: Network = "text_encoder"
    learns_vectors: ClassVar[bool] = True

    def __init__(
        self,
        retain: Sequence[AnyText] | File | None = None,
        parameters: Targets = ("encoder", "final_layer_norm"),
        steps: TrainingSteps = 1000,
        lr: LearningRate = 1e-5,
        weight_decay: NonNegative = 0.0,
        negative_guidance: Finite = 1.0,
        retain_weight: NonNegative = 0.3,
        attack_lr: LearningRate = 1e-3,
        attack: Literal["pgd", "fast"] = "pgd",
        place: Place = "prefix",
        accumulate: bool = True,
        clip: Positive | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.steps, self.lr, self.weight_decay, self.clip = steps, lr, weight_decay, clip
        self.negative_guidance, self.retain_weight = negative_guidance, retain_weight
        self.attack_lr, self.fast, self.before, self.accumulate = (
            attack_lr,
            attack == "fast",
            place == "prefix",
            accumulate,
        )
        self.texts: dict[str, TextStates] = {}  # by the original text encoder
        self.own: dict[str, Tensor] = {}  # (n, D), the token vectors of a name
        self.retain = read_captions(retain, "method.align.retain")
        self.prompts: list[str] = []
        self.kept: TextStates | None = None  # the prompts, read by the original text encoder

    @staticmethod
    def passes(settings: Mapping[str, Any], steps: int) -> float:
        """Denoiser passes for each z_t itself; `ForgetAndRetain` counts those of the attack and of the retained
        prompts."""
        return 2.0 + PASSES_OF_A_GRADIENT

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Reads the names and the empty prompt with the original text encoder."""
        names = [pair.concept.target for pair in pairs]
        with backbone.original():
            self.texts = {text: backbone.encode([text]) for text in ["", *names]}
            self.own = {name: backbone.token_vectors(name) for name in names if name}
            self.prompts = kept_prompts(self.retain, names)
            self.kept = on_cpu(backbone.encode(self.prompts))

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"erase", "retain"}, and "attack" without gradient, the attacker's last loss; known: as `ForgetAndRetain`
        gives it."""
        latents, timesteps, known, name = batch.latents, batch.timesteps, batch.known, pair.concept.target
        c, empty = (repeat(self.texts[text], 0, len(latents)) for text in (name, ""))
        with torch.no_grad(), backbone.original():
            uncond = predict(backbone, latents, timesteps, empty)
            cond = predict(backbone, latents, timesteps, c)
        target = uncond - self.negative_guidance * (cond - uncond)
        terms: dict[str, Tensor] = {}
        if "attack_latents" in known and name:
            vectors, left = self.attacked(backbone, name, known)
            texts = self.read(backbone, name, vectors)
            terms["attack"] = left
        else:
            texts = repeat(backbone.encode([name]), 0, len(latents))
        terms = {"erase": mse_loss(predict(backbone, latents, timesteps, texts), target), **terms}
        if "retain_latents" in known:
            terms["retain"] = self.retain_weight * self._moved(backbone, known)
        return terms

    def attacked(self, backbone: Backbone, name: str, known: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The found vectors (B, k, D), and the mean loss of the last attack step."""
        z, t = known["attack_latents"], known["attack_timesteps"]
        vectors = known["attack_start"].to(z.device).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([vectors], lr=self.attack_lr)
        total = torch.zeros_like(vectors)
        loss = torch.zeros(len(z))
        for step in range(z.shape[1]):
            c = repeat(self.texts[name], 0, len(z))
            with torch.no_grad(), backbone.original():
                goal = predict(backbone, z[:, step], t[:, step], c)
            made = predict(backbone, z[:, step], t[:, step], self.read(backbone, name, vectors))
            loss = (made - goal).square().flatten(1).mean(1)
            (gradient,) = torch.autograd.grad(loss.sum(), [vectors])
            total = gradient + total if self.accumulate else gradient
            if self.fast:
                total = total.sign()
            vectors.grad = total.clone()
            optimizer.step()
        return vectors.detach(), loss.detach().mean()

    def read(self, backbone: Backbone, name: str, vectors: Tensor) -> TextStates:
        """The states of c' for each (k, D) of `vectors` (B, k, D), with gradients."""
        own = self.own[name].to(vectors)
        prompt = [NamedPrompt.of("{}", name)]
        read = [
            backbone.encode(prompt, vectors=torch.cat([one, own] if self.before else [own, one])) for one in vectors
        ]
        pooled = None if read[0].pooled is None else torch.cat([one.pooled for one in read if one.pooled is not None])
        whole = repeat(read[0], 0, len(read))
        return replace(whole, states=torch.cat([one.states for one in read]), pooled=pooled)

    def _moved(self, backbone: Backbone, known: Mapping[str, Tensor]) -> Tensor:
        """How far the noise of the retained prompts moved."""
        z, t, prompts = (known[f"retain_{part}"].flatten(0, 1) for part in ("latents", "timesteps", "prompts"))
        assert self.kept is not None
        with torch.no_grad(), backbone.original():
            kept = predict(backbone, z, t, take(self.kept, prompts))
        now = backbone.encode([self.prompts[i] for i in prompts.tolist()])
        return mse_loss(predict(backbone, z, t, now), kept)


def kept_prompts(captions: Sequence[str], names: Sequence[str]) -> list[str]:
    """The captions that name none of the concepts. Raises UserError if there is none."""
    found = [caption for caption in captions if not named(caption, names)]
    if not found:
        raise UserError(f"Every prompt of method.latents.retain names {', '.join(names)}: add prompts that do not.")
    return found
