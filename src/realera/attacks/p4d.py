"""Prompting4Debugging (arXiv 2309.06135): a prompt for which the erased model predicts the noise that the original
model predicts for the prompt of the concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from realera.attack_contract import Attempt, Case
from realera.attacks.tokens import Searched, Vocabularies, Vocabulary, both_ways, encoder_of, joined, states_of
from realera.contracts import PASSES_OF_A_GRADIENT
from realera.methods.latents import noised
from realera.methods.texts import predict, repeat, take
from realera.setting_types import Batch, Count, LearningRate, NonNegative, Number

Form = Literal["n", "k"]
Steps = Annotated[int, Number(1, 10**6, whole=True)]


class PromptingForDebugging:
    """Searches vectors P for the loss |eps_erased(z_t, t, proj(P)) - eps_original(z_t, t, prompt)|^2, z_t the original
    model's image of the prompt at a random timestep (equation 5 of the paper).

    proj replaces each vector by the token embedding of the largest cosine; the gradient at proj(P) moves P. Every
    `test` steps of AdamW the projected tokens are drawn as they read when typed; it ends at the first image of the
    concept (official code: all steps, then the prompt whose image is most like the original's, by CLIP). Official code:
    joycenerd/P4D.

    form: n = a prompt of `tokens` searched tokens in place of the prompt (P4D-N) | k = the prompt itself, with a
    searched token before each `interval` of its tokens and at its end (P4D-K). The vectors begin as those of random
    tokens. batch: timesteps of a step. vocabulary: see `Searched`. together: prompts attacked at once.
    """

    counts_plain = False
    learns_vectors = True

    def __init__(
        self,
        form: Form = "n",
        tokens: Count = 16,
        interval: Count = 3,
        steps: Steps = 3000,
        test: Count = 50,
        batch: Batch = 1,
        lr: LearningRate = 0.1,
        weight_decay: NonNegative = 0.1,
        vocabulary: Searched = "all",
        together: Batch = 1,
    ) -> None:
        self.form, self.tokens, self.interval = form, tokens, interval
        self.steps, self.test, self.batch = steps, test, batch
        self.lr, self.weight_decay = lr, weight_decay
        self.vocabularies = Vocabularies(vocabulary)
        self.together = together

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        steps = int(settings["steps"])
        tests = -(-steps // int(settings["test"]))
        return steps * int(settings["batch"]) * (1 + PASSES_OF_A_GRADIENT) + tests * per_image

    def __call__(self, case: Case) -> Mapping[str, Any]:
        return self.attack_together([case])[0]

    def attack_together(self, cases: Sequence[Case]) -> Sequence[Mapping[str, Any]]:
        vocabulary = self.vocabularies.of(cases[0].backbone)
        searches = [_Search(case, vocabulary, self) for case in cases]
        left = searches
        for number in range(1, self.steps + 1):
            step(left, self.batch)
            if number % self.test and number != self.steps:
                continue
            attempts = [Attempt(search.text) for search in left]
            shown = left[0].case.draw_all([search.case for search in left], attempts, step=number)
            left = [search for search, found in zip(left, shown) if not found]
            if not left:
                break
        return [both_ways(search.case.backbone, search.ids, search.text) for search in searches]


class _Search:
    """One prompt's vectors (n, D), and where they stand among its fixed tokens."""

    def __init__(self, case: Case, vocabulary: Vocabulary, settings: PromptingForDebugging) -> None:
        self.case, self.vocabulary = case, vocabulary
        self.latents = case.image_latents()
        with case.backbone.original():
            self.goal = case.backbone.encode([case.prompt.text])
        reads, room = encoder_of(case.backbone), case.backbone.max_length - 2
        own = reads.token_ids([case.prompt.text])[0]
        self.order = (
            arranged(own, settings.interval, room) if settings.form == "k" else [None] * min(settings.tokens, room)
        )
        fixed = [0 if token is None else token for token in self.order]  # the zeros are replaced
        self.free = torch.tensor([place for place, token in enumerate(self.order) if token is None])
        self.around = reads.token_embeddings()[torch.tensor(fixed, device=vocabulary.vectors.device)]
        start = torch.randint(len(vocabulary), (len(self.free),), generator=case.generator)
        self.vectors = vocabulary.vectors[start.to(self.around.device)].clone()
        self.optimizer = torch.optim.AdamW([self.vectors], lr=settings.lr, weight_decay=settings.weight_decay)

    @property
    def ids(self) -> list[int]:
        found = iter(self.vocabulary.ids_of(self.vocabulary.nearest(self.vectors)))
        return [next(found) if token is None else token for token in self.order]

    @property
    def text(self) -> str:
        return encoder_of(self.case.backbone).text_of(self.ids)

    def prompt(self, vectors: Tensor) -> Tensor:
        """(n', D): the embeddings of all tokens, with these vectors in their places."""
        return self.around.index_copy(0, self.free.to(vectors.device), vectors)


def arranged(own: Sequence[int], interval: int, room: int) -> list[int | None]:
    """The tokens of a prompt with None where a token is searched: before each `interval` tokens and, where one would
    come next, at the end. At most `room` in all."""
    count = len(own) // interval + 1
    found: list[int | None] = []
    for number in range(count):
        found += [None, *own[number * interval : (number + 1) * interval]]
    return found[:room]


def step(searches: Sequence[_Search], batch: int) -> None:
    """One step of all searches, each at `batch` timesteps."""
    backbone = searches[0].case.backbone
    parts = [
        noised(backbone, one.latents, torch.zeros(batch, dtype=torch.int64), one.case.generator) for one in searches
    ]
    z_t, timesteps = (torch.cat([part[which] for part in parts]) for which in (0, 1))
    wanted = joined([repeat(search.goal, 0, batch) for search in searches])
    with backbone.original():
        aims = predict(backbone, z_t, timesteps, wanted)
    vectors = [one.vocabulary.vectors[one.vocabulary.nearest(one.vectors)].requires_grad_() for one in searches]
    texts = [search.text for search in searches]
    with torch.enable_grad():
        states = states_of(backbone, [search.prompt(own) for search, own in zip(searches, vectors)])
        read = take(states, torch.arange(len(searches)).repeat_interleave(batch))
        with searches[0].case.acting([text for text in texts for _ in range(batch)], read):
            losses = (predict(backbone, z_t, timesteps, read) - aims).square().flatten(1).mean(dim=1)
        gradients = torch.autograd.grad(losses.sum() / batch, vectors)
    for search, gradient in zip(searches, gradients):
        search.vectors.grad = gradient
        search.optimizer.step()
