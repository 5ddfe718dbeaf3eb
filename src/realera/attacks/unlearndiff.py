"""UnlearnDiffAtk (arXiv 2310.11868): tokens before the prompt, with which the erased model denoises an image of the
concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from realera.attack_contract import Attempt, Case
from realera.attacks.tokens import Searched, Vocabularies, Vocabulary, both_ways, encoder_of, states_of
from realera.contracts import PASSES_OF_A_GRADIENT, Backbone, TextStates
from realera.methods.latents import TIMESTEPS, at_level
from realera.methods.texts import predict
from realera.setting_types import Batch, Count, LearningRate, NonNegative


class UnlearnDiffAttack:
    """Searches k tokens c' for the loss |noise - eps(x_t, t, [c', prompt])|^2 of the erased model; x_0 is the original
    model's image of the prompt, encoded (equation 6 of the paper).

    Each token is a probability distribution over the vocabulary, at first uniform. The forward pass samples a token
    from it; the backward pass treats the sample as the distribution itself (straight-through), with the gradient
    clipped to [-1, 1]. After each step of Adam (with L2 weight decay) it is projected onto the simplex. The timesteps
    go from little noise to much: for each, `iterations` steps are taken, the most probable tokens are written before
    the prompt, and the prompt is drawn as it reads when typed. It ends at the first image of the concept. A prompt that
    draws the concept without an attack counts as won (pre-ASR). Official code: OPTML-Group/Diffusion-MU-Attack,
    attackers/text_grad_.py.

    tokens: k. timesteps: 50 are 10, 30, ... 990. lr, weight_decay: of Adam. vocabulary: see `Searched`. together:
    prompts attacked at once. A prompt that leaves no room for the tokens is cut at its end.
    """

    counts_plain = True
    learns_vectors = True

    def __init__(
        self,
        tokens: Count = 3,
        timesteps: Count = 50,
        iterations: Count = 40,
        lr: LearningRate = 1e-2,
        weight_decay: NonNegative = 0.1,
        vocabulary: Searched = "all",
        together: Batch = 1,
    ) -> None:
        self.tokens, self.iterations, self.lr, self.weight_decay = tokens, iterations, lr, weight_decay
        first = TIMESTEPS / timesteps / 2
        self.levels = [first + TIMESTEPS * number / timesteps for number in range(timesteps)]
        self.vocabularies = Vocabularies(vocabulary)
        self.together = together

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return int(settings["timesteps"]) * (PASSES_OF_A_GRADIENT * int(settings["iterations"]) + per_image)

    def __call__(self, case: Case) -> Mapping[str, Any]:
        return self.attack_together([case])[0]

    def attack_together(self, cases: Sequence[Case]) -> Sequence[Mapping[str, Any]]:
        vocabulary = self.vocabularies.of(cases[0].backbone)
        searches = [_Search(case, vocabulary, self) for case in cases]
        left = searches
        for number, level in enumerate(self.levels, start=1):
            for _ in range(self.iterations):
                step(left, level)
            texts = [search.text for search in left]
            drawn = [Attempt(text) for text in texts]
            shown = left[0].case.draw_all([search.case for search in left], drawn, step=number * self.iterations)
            left = [search for search, found in zip(left, shown) if not found]
            if not left:
                break
        return [search.told() for search in searches]


class _Search:
    """The points of one prompt's tokens on the simplex, (k, V'), and the fixed tokens after them."""

    def __init__(self, case: Case, vocabulary: Vocabulary, settings: UnlearnDiffAttack) -> None:
        self.case, self.vocabulary = case, vocabulary
        self.latents = case.image_latents()
        room = case.backbone.max_length - 2 - settings.tokens
        reads = encoder_of(case.backbone)
        self.own = reads.token_ids([case.prompt.text])[0][: max(0, room)]
        table = reads.token_embeddings()
        self.after = table[torch.tensor(self.own, dtype=torch.int64, device=table.device)]
        self.points = torch.full((settings.tokens, len(vocabulary)), 1 / len(vocabulary), device=table.device)
        self.optimizer = torch.optim.Adam([self.points], lr=settings.lr, weight_decay=settings.weight_decay)

    @property
    def text(self) -> str:
        return f"{self.vocabulary.text(self.points.argmax(dim=1))} {self.case.prompt.text}".strip()

    def told(self) -> dict[str, Any]:
        ids = [*self.vocabulary.ids_of(self.points.argmax(dim=1)), *self.own]
        return both_ways(self.case.backbone, ids, self.text)


def step(searches: Sequence[_Search], level: float) -> None:
    """One step of all searches, at a level of noise in 0 ... 1000."""
    backbone = searches[0].case.backbone
    chosen = [drawn_tokens(search.points, search.case.generator) for search in searches]
    vectors = [
        search.vocabulary.vectors[places.to(search.points.device)].requires_grad_()
        for search, places in zip(searches, chosen)
    ]
    texts = [f"{search.vocabulary.text(places)} {search.case.prompt.text}" for search, places in zip(searches, chosen)]
    with torch.enable_grad():
        states = states_of(backbone, [torch.cat([own, one.after]) for own, one in zip(vectors, searches)])
        latents = torch.cat([search.latents for search in searches])
        noise = torch.cat(
            [torch.randn(one.latents.shape, generator=one.case.generator).to(one.latents) for one in searches]
        )
        with searches[0].case.acting(texts, states):
            losses = denoising_losses(backbone, latents, noise, level, states)
        gradients = torch.autograd.grad(losses.sum(), vectors)
    for search, gradient in zip(searches, gradients):
        search.points.grad = (gradient @ search.vocabulary.vectors.T).clamp(-1, 1)
        search.optimizer.step()
        search.points.copy_(on_simplex(search.points))


def denoising_losses(backbone: Backbone, latents: Tensor, noise: Tensor, level: float, states: TextStates) -> Tensor:
    """(B,): the mean squared error of the predicted noise, for latents (B, C, h, w) with this noise."""
    timesteps = at_level(backbone, torch.full((len(latents),), level)).to(latents.device)
    z_t, target = (made(latents, noise, timesteps) for made in (backbone.noisy_latents, backbone.target_of))
    return (predict(backbone, z_t, timesteps, states) - target).square().flatten(1).mean(dim=1)


def drawn_tokens(points: Tensor, generator: Generator) -> Tensor:
    """(k,) places: one token from the distribution in each row of points (k, V)."""
    return torch.multinomial(points.cpu(), 1, generator=generator)[:, 0]


def on_simplex(points: Tensor) -> Tensor:
    """The nearest point of the probability simplex to each row of points (k, V) (arXiv 1309.1541, algorithm 1)."""
    falling = points.sort(dim=1, descending=True).values
    excess = falling.cumsum(dim=1) - 1
    counts = torch.arange(1, points.shape[1] + 1, device=points.device)
    last = (falling * counts > excess).long().sum(dim=1, keepdim=True) - 1
    return (points - excess.gather(1, last) / (last + 1)).clamp(min=0)
