"""SPM (arXiv 2312.16145): each concept is erased by a membrane, an adapter of rank 1 on every layer of the U-Net's
transformers. Other concepts are protected from the membrane during training (latent anchoring) and while images are
drawn (facilitated transport).

Letters: c the bare name of the concept, n a neutral text, k one of SPM's anchors (a word that is far from c), H(p) the
text states of p. B latents, K anchors per step, T token rows, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from realera.contracts import (
    PASSES_OF_A_GRADIENT,
    PASSES_OF_A_STEP,
    Backbone,
    LoraSpec,
    Miner,
    Pair,
    TextStates,
    TrainingBatch,
    UserError,
)
from realera.methods.texts import join, predict, repeat, take
from realera.setting_types import (
    AnyText,
    Batch,
    Finite,
    Label,
    LearningRate,
    Name,
    NonNegative,
    Number,
    Positive,
    TrainingSteps,
    Whole,
)

Power = Annotated[float, Number(0, 100)]
Anchoring = Literal["words", "noise"]
Transport = Literal["per_module", "official", "none"]


class SemiPermeableMembrane:
    """The paper's loss, with means in place of norms and eps0 the original model:

        || eps(z_t, c) - (eps0(z_t, n) - eta (eps0(z_t, c) - eps0(z_t, n))) ||^2
        + anchor_weight E_k || eps(z_t, k) - eps0(z_t, k) ||^2                          (latent anchoring)

    neutral: n; None = the concept's anchor. negative_guidance: eta. anchors: K. anchoring: "words" = k is drawn from
    `words` with a probability proportional to (1 - cos(H(k), H(c)))^anchor_power, all rows as one vector; c is never
    drawn. "noise" = the effect of the official code: H(k) is Gaussian noise with 0.8 to 1.2 times the norm of H(c)
    (the code's rejection by cosine rejects nothing in this dimension). Each of the K noises follows an empty prompt,
    and only the second half of these 2K texts is used: of four, two are noise and two are empty. anchor_weight 0 turns
    latent anchoring off.

    lr: the highest rate of AdamW. It rises linearly in the first `warmup` steps of each concept, then falls along a
    cosine `cycles` times, each time from the top; cycles 0 keeps it constant. clip: upper bound of the gradient's norm,
    None = unbounded. steps, lora: of each concept.
    """

    parameters = ()  # only the membranes are trained

    @staticmethod
    def passes(settings: Mapping[str, Any], steps: int) -> float:
        """Denoiser passes per step: the usual ones, and for each anchor one of the teacher and one with gradient."""
        anchors = int(settings.get("anchors") or 0) if settings.get("anchor_weight", 1) else 0
        return PASSES_OF_A_STEP + anchors * (1 + PASSES_OF_A_GRADIENT)

    def __init__(
        self,
        lora: LoraSpec,
        steps: TrainingSteps = 3000,
        lr: LearningRate = 1e-4,
        weight_decay: NonNegative = 0.01,
        warmup: TrainingSteps = 500,
        cycles: Whole = 3,
        neutral: AnyText | None = "",
        negative_guidance: Finite = 1.0,
        anchor_weight: NonNegative = 1000.0,
        anchors: Batch = 4,
        anchoring: Anchoring = "words",
        anchor_power: Power = 1.0,
        words: Sequence[Label] = (),
        clip: Positive | None = None,
    ) -> None:
        self.lora = replace(lora, targets=tuple(lora.targets))  # yaml gives a list
        self.steps, self.lr, self.weight_decay = steps, lr, weight_decay
        self.warmup, self.cycles, self.clip = warmup, cycles, clip
        self.neutral = neutral
        self.negative_guidance = negative_guidance
        self.anchor_weight, self.anchors, self.anchor_power = anchor_weight, anchors, anchor_power
        self.words = list(dict.fromkeys(words)) if anchoring == "words" and anchor_weight > 0 else []
        self.by_noise = anchoring == "noise"
        self.texts: dict[str, TextStates] = {}
        self.far: dict[str, Tensor] = {}  # {concept: the sampling weight of each word}

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Encodes the names and the words, and computes the words' sampling weights for each concept."""
        names = [pair.concept.target for pair in pairs]
        neutrals = [self._neutral(pair) for pair in pairs]
        empty = [""] if self.by_noise else []
        self.texts = {text: backbone.encode([text]) for text in (*names, *neutrals, *empty)}
        if self.anchor_weight == 0 or self.by_noise:
            return
        self._words = backbone.encode(self.words)
        for name in names:
            distance = 1 - cosines(self.texts[name].states, self._words.states)[0].cpu()
            others = torch.tensor([word.casefold() != name.casefold() for word in self.words])
            self.far[name] = distance.clamp(min=0) ** self.anchor_power * others
            if int((self.far[name] > 0).sum()) < self.anchors:
                raise UserError(
                    f"method.align.words has too few words besides {name!r} to draw {self.anchors} anchors: add words, "
                    "or set method.align.anchoring=noise."
                )

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"erase", "anchor"}, and "anchor_unweighted" without gradient."""
        latents, timesteps = batch.latents, batch.timesteps
        count = len(latents)
        c, n = (repeat(self.texts[text], 0, count) for text in (pair.concept.target, self._neutral(pair)))
        with torch.no_grad(), backbone.original():
            neutral = predict(backbone, latents, timesteps, n)
            positive = predict(backbone, latents, timesteps, c)
        target = neutral - self.negative_guidance * (positive - neutral)
        terms = {"erase": mse_loss(predict(backbone, latents, timesteps, c), target)}
        if self.anchor_weight > 0:
            k = self._anchors(pair.concept.target, generator)
            k = take(k, torch.arange(self.anchors).repeat_interleave(count))
            z_t, t = latents.repeat(self.anchors, 1, 1, 1), timesteps.repeat(self.anchors)
            with torch.no_grad(), backbone.original():
                kept = predict(backbone, z_t, t, k)
            moved = mse_loss(predict(backbone, z_t, t, k), kept)
            terms |= {"anchor": self.anchor_weight * moved, "anchor_unweighted": moved.detach()}
        return terms

    def rate(self, step: int) -> float:
        """The factor on `lr` in a concept's step, counted from 1."""
        if step <= self.warmup:
            return (step - 1) / self.warmup
        if self.cycles == 0:
            return 1.0
        done = (step - 1 - self.warmup) / max(1, self.steps - self.warmup)
        return 0.0 if done >= 1 else 0.5 * (1 + math.cos(math.pi * (self.cycles * done % 1)))

    def _neutral(self, pair: Pair) -> str:
        return pair.concept.anchor if self.neutral is None else self.neutral

    def _anchors(self, name: str, generator: Generator) -> TextStates:
        """The texts of K anchors."""
        if not self.by_noise:
            return take(self._words, torch.multinomial(self.far[name], self.anchors, generator=generator))
        c = self.texts[name]
        noise = torch.randn(self.anchors, *c.states.shape[1:], generator=generator)
        lengths = 0.8 + 0.4 * torch.rand(self.anchors, 1, 1, generator=generator)
        unit = noise / noise.flatten(1).norm(dim=1)[:, None, None]
        noisy = replace(repeat(c, 0, self.anchors), states=(lengths * unit).to(c.states) * c.states.norm())
        pairs = [row for k in range(self.anchors) for row in (0, 1 + k)]  # empty, noise, empty, ...
        return take(join(self.texts[""], noisy, c.states.device), torch.tensor(pairs[self.anchors :]))


@dataclass
class FacilitatedTransport:
    """`contracts.Guide`: scales each concept's membrane by its permeability for a prompt p,

        m_i = max( cos(H(p), H(c_i)), share of c_i's sub-tokens that p has ),

    all rows of H as one vector. transport: "per_module" = each adapter is scaled by m_i (the paper); "official" = as in
    the official code, which multiplies both factors of an adapter by m_i and sums the factors of all concepts instead
    of the adapters: one concept is scaled by m^2, several get cross terms; "none" = full strength.

    concepts: the names, in the order in which they were erased.

    Raises UserError without concepts, unless transport is "none".
    """

    weighs_adapters: ClassVar[bool] = True
    concepts: Name | Sequence[Name] | None = ()
    transport: Transport = "per_module"
    prompts: Sequence[str] = field(default=(), init=False)
    names: Sequence[str] = field(default=(), init=False)

    def __post_init__(self) -> None:
        given = [self.concepts] if isinstance(self.concepts, str | int) else list(self.concepts or ())
        self.concepts = self.names = tuple(map(str, given))
        if not self.concepts and self.transport != "none":
            raise UserError(
                "method.guide has no concept to compare prompts with: name one (method.guide.concepts=NAME), or set "
                "method.guide.transport=none."
            )

    def around(self, backbone: Backbone, texts: Sequence[str]) -> AbstractContextManager[None]:
        return self.around_states(backbone, backbone.encode(texts), texts)

    @contextmanager
    def around_states(self, backbone: Backbone, states: TextStates, texts: Sequence[str]) -> Iterator[None]:
        """As `around`, for prompts whose text states may be other ones than those of their texts."""
        if self.transport == "none":
            yield
            return
        m = permeability(backbone, texts, self.names, states)
        with backbone.adapter_scale(m if self.transport == "per_module" else m[:, :, None] * m[:, None, :]):
            yield

    def __call__(
        self, uncond: Tensor, cond: Tensor, beside: Tensor, latents: Tensor, step: int, guidance_scale: float
    ) -> Tensor:
        """Plain guidance: `around` has already scaled the membranes."""
        return uncond + guidance_scale * (cond - uncond)


def permeability(
    backbone: Backbone, texts: Sequence[str], concepts: Sequence[str], states: TextStates | None = None
) -> Tensor:
    """m (B, concepts) in 0 ... 1 of `FacilitatedTransport`. states: of the prompts; None = those of the texts."""
    read = backbone.encode(texts) if states is None else states
    close = cosines(read.states.detach(), backbone.encode(concepts).states.to(read.states))
    typed, named = backbone.tokens(texts), backbone.tokens(concepts)
    shared = torch.tensor([[len(p & c) / max(1, len(c)) for c in named] for p in typed])
    return torch.maximum(close, shared.to(close)).clamp(0, 1)


def cosines(states: Tensor, others: Tensor) -> Tensor:
    """(A, B) cosines of text states (A, T, D) and (B, T, D), all rows of each as one vector."""
    a, b = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in (states, others))
    result: Tensor = a @ b.T
    return result
