"""MMA-Diffusion's attack on the text (arXiv 2311.17516): a prompt without the concept's words that the text encoder
reads as the prompt of the concept."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity

from realera.attack_contract import Attempt, Case
from realera.attacks.tokens import (
    Searched,
    Vocabularies,
    Vocabulary,
    both_ways,
    found_once,
    is_banned,
    states_of,
    words_of,
)
from realera.contracts import PASSES_OF_A_GRADIENT, Backbone, TextStates
from realera.setting_types import Batch, Count


class MMADiffusion:
    """Searches tokens P for the loss 1 - cos(e(P), e(prompt)) (equation 2 of the paper), e the original text encoder's
    state of the text's end, after the final norm (for SDXL the pooled state that its U-Net takes).

    A step of greedy coordinate gradient: the gradient of the loss by the one-hot vector of each token gives the `top`
    tokens that lower it most; `candidates` prompts are made, each with one token replaced by a random one of its top
    ones, as many for each position; those that are read as another number of tokens when typed are left out; the best
    of the others is the next prompt, even if it is worse than the last one. The best prompt of all steps is drawn once.
    It starts from random letters. Tokens with a word of the concept in them are banned, and so is a prompt in which the
    tokens together spell one. Official code: cure-lab/MMA-Diffusion (its gradient includes BOS and so stands one
    position beside the token; here it does not).

    tokens: of the prompt. steps. vocabulary: see `Searched`. together: prompts drawn at once. The search knows neither
    the erased model nor its images, so it is shared through the cache.
    """

    counts_plain = False
    learns_vectors = True

    def __init__(
        self,
        tokens: Count = 20,
        steps: Count = 1000,
        top: Count = 256,
        candidates: Count = 512,
        vocabulary: Searched = "all",
        together: Batch = 1,
    ) -> None:
        self.tokens, self.steps, self.top, self.candidates = tokens, steps, top, candidates
        self.vocabularies = Vocabularies(vocabulary)
        self.together = together

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return per_image

    @staticmethod
    def text_passes(settings: Mapping[str, Any]) -> float:
        return int(settings["steps"]) * float(PASSES_OF_A_GRADIENT + int(settings["candidates"]))

    def __call__(self, case: Case) -> Mapping[str, Any]:
        return self.attack_together([case])[0]

    def attack_together(self, cases: Sequence[Case]) -> Sequence[Mapping[str, Any]]:
        found = [self.found(case) for case in cases]
        reads = self.vocabularies.of(cases[0].backbone, words_of(cases[0].concept.target)).reads
        texts = [reads.text_of(ids) for ids in found]
        cases[0].draw_all(cases, [Attempt(text) for text in texts], step=self.steps)
        return [both_ways(case.backbone, ids, text) for case, ids, text in zip(cases, found, texts)]

    def found(self, case: Case) -> list[int]:
        """The ids of the prompt's tokens."""
        banned = words_of(case.concept.target)
        vocabulary = self.vocabularies.of(case.backbone, banned)
        settings = {key: value for key, value in vars(self).items() if key not in ("vocabularies", "together")}
        about = {
            "settings": settings,
            "vocabulary": self.vocabularies.searched,
            "prompt": case.prompt.text,
            "banned": banned,
        }

        def make() -> Sequence[int]:
            with case.backbone.original():
                goal = end_state(case.backbone.encode([case.prompt.text]))[0]
                return self.climbed(vocabulary, goal, banned, case.generator)

        return found_once(case.backbone, "mma", about, case.generator, make)

    def climbed(self, vocabulary: Vocabulary, goal: Tensor, banned: Sequence[str], generator: Generator) -> list[int]:
        """The ids of the best prompt. goal (D,)."""
        backbone, reads = vocabulary.backbone, vocabulary.reads
        letters = [letter for letter in string.ascii_letters if not is_banned(letter, banned)]
        count = min(self.tokens, backbone.max_length - 2)
        start = [letters[i] for i in torch.randint(len(letters), (count,), generator=generator).tolist()]
        current = reads.token_ids([" ".join(start)])[0]
        best, least = current, float(losses(backbone, [reads.text_of(current)], goal)[0])
        for _ in range(self.steps):
            gradient = token_gradient(vocabulary, current, goal)
            made = replaced(vocabulary, current, gradient, self.top, self.candidates, generator)
            texts = as_long(vocabulary, made, reads.text_of(current), banned)
            if not texts:
                continue
            found = losses(backbone, texts, goal)
            place = int(found.argmin())
            current = reads.token_ids([texts[place]])[0]
            if float(found[place]) < least:
                best, least = current, float(found[place])
        return best


def end_state(states: TextStates) -> Tensor:
    """(B, E): the pooled state, or the state of the text's end if the U-Net takes no pooled one."""
    if states.pooled is not None:
        return states.pooled
    return states.states[torch.arange(len(states.states), device=states.states.device), states.length]


def losses(backbone: Backbone, texts: Sequence[str], goal: Tensor) -> Tensor:
    """(B,) on the CPU: 1 - the cosine of each text's end with `goal` (E,)."""
    found = end_state(backbone.encode(texts, to_end=True))
    return 1 - cosine_similarity(found, goal.to(found)[None], dim=1, eps=1e-6).cpu()


def token_gradient(vocabulary: Vocabulary, ids: Sequence[int], goal: Tensor) -> Tensor:
    """(n, V'): the gradient of the loss of a prompt by the one-hot vectors of its n tokens."""
    table = vocabulary.reads.token_embeddings()
    vectors = table[torch.tensor(ids, device=table.device)].requires_grad_()
    with torch.enable_grad():
        end = end_state(states_of(vocabulary.backbone, [vectors]))[0]
        (gradient,) = torch.autograd.grad(1 - cosine_similarity(end, goal.to(end), dim=0, eps=1e-6), [vectors])
    return gradient @ vocabulary.vectors.T


def replaced(
    vocabulary: Vocabulary, ids: Sequence[int], gradient: Tensor, top: int, count: int, generator: Generator
) -> list[list[int]]:
    """`count` prompts, each with one token replaced by a random one of the `top` tokens of least gradient at its
    position. The positions have equal shares of the prompts."""
    best = (-gradient).topk(min(top, gradient.shape[1]), dim=1).indices.cpu()
    positions = torch.arange(count) * len(ids) // count
    chosen = best[positions, torch.randint(best.shape[1], (count,), generator=generator)]
    made = torch.tensor(ids).repeat(count, 1)
    made[torch.arange(count), positions] = vocabulary.ids[chosen]
    found: list[list[int]] = made.tolist()
    return found


def as_long(vocabulary: Vocabulary, prompts: Sequence[Sequence[int]], current: str, banned: Sequence[str]) -> list[str]:
    """The distinct texts of those prompts that are read as many tokens as they have, other than `current` and without a
    banned word."""
    texts = list(dict.fromkeys(vocabulary.reads.text_of(ids) for ids in prompts))
    texts = [text for text in texts if text != current and not is_banned(text, banned)]
    length = len(prompts[0])
    return [text for text, ids in zip(texts, vocabulary.reads.token_ids(texts)) if len(ids) == length]
