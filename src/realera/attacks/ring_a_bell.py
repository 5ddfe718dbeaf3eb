"""Ring-A-Bell (arXiv 2310.10012): a genetic search for a prompt whose text states are the prompt's plus the concept's
direction. It knows the text encoder alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
from torch import Generator, Tensor

from realera.attack_contract import Attacked, Attempt, Case
from realera.attacks.tokens import Searched, Vocabularies, Vocabulary, both_ways, found_once
from realera.contracts import Backbone, NamedPrompt
from realera.setting_types import Batch, Count, Finite, Number, Share

Population = Annotated[int, Number(2, 10**5, whole=True)]


class RingABell:
    """Searches tokens P for the squared distance |H(P) - (H(prompt) + eta c)|^2 (equation 3 of the paper), H the states
    of all rows (T, D) of the original text encoder and c the concept vector: the mean of H(prompt with the concept) -
    H(the same with its anchor) over the task's training prompts of the concept.

    A generation: the better half of the population stays; each of it, with the probability `crossover`, has two
    children with another one of the half, which swap the tokens after a random place; then each individual, with the
    probability `mutation`, has one token replaced by a random one. The best prompt of all generations (official code:
    of the last one) is drawn once. Here the text of an individual is typed and read again before its distance is
    computed; the official code computes it from the tokens. Official code: chiayi-hsu/Ring-A-Bell.

    tokens: K. population, generations: of the search. eta: strength of the concept. vocabulary: see `Searched`.
    together: prompts drawn at once. The search knows neither the erased model nor its images, so it is shared through
    the cache.
    """

    counts_plain = False

    def __init__(
        self,
        tokens: Count = 16,
        eta: Finite = 3.0,
        population: Population = 200,
        generations: Count = 3000,
        mutation: Share = 0.25,
        crossover: Share = 0.5,
        vocabulary: Searched = "all",
        together: Batch = 1,
    ) -> None:
        self.tokens, self.eta, self.population, self.generations = tokens, eta, population, generations
        self.mutation, self.crossover = mutation, crossover
        self.vocabularies = Vocabularies(vocabulary)
        self.together = together

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return per_image

    @staticmethod
    def passes_of_search(settings: Mapping[str, Any], per_image: float) -> float:
        return 0.0

    @staticmethod
    def text_passes(settings: Mapping[str, Any]) -> float:
        """An individual is read once. In a generation these are the children, two for the share `crossover` of the
        parents, and the parents with a new token."""
        population, share = int(settings["population"]), float(settings["mutation"]) + 2 * float(settings["crossover"])
        return population + (int(settings["generations"]) - 1) * (population // 2) * share

    def search(self, attacked: Attacked) -> Mapping[str, Tensor]:
        with attacked.backbone.original():
            return {"vector": concept_vector(attacked.backbone, attacked.names, attacked.concept.anchor)}

    def __call__(self, case: Case) -> Mapping[str, Any]:
        return self.attack_together([case])[0]

    def attack_together(self, cases: Sequence[Case]) -> Sequence[Mapping[str, Any]]:
        found = [self.found(case) for case in cases]
        reads = self.vocabularies.of(cases[0].backbone).reads
        texts = [reads.text_of(ids) for ids in found]
        cases[0].draw_all(cases, [Attempt(text) for text in texts], step=self.generations)
        return [both_ways(case.backbone, ids, text) for case, ids, text in zip(cases, found, texts)]

    def found(self, case: Case) -> list[int]:
        """The ids of the prompt's tokens."""
        backbone, vocabulary = case.backbone, self.vocabularies.of(case.backbone)
        settings = {key: value for key, value in vars(self).items() if key not in ("vocabularies", "together")}
        about = {
            "settings": settings,
            "vocabulary": self.vocabularies.searched,
            "prompt": case.prompt.text,
            "names": [asdict(named) for named in case.names],
            "anchor": case.concept.anchor,
        }

        def make() -> Sequence[int]:
            with backbone.original():
                prompt = backbone.encode([case.prompt.text]).states[0]
                goal = prompt + self.eta * case.searched["vector"].to(prompt)
                return self.bred(vocabulary, lambda texts: distances(backbone, texts, goal), case.generator)

        return found_once(backbone, "ring-a-bell", about, case.generator, make)

    def bred(
        self, vocabulary: Vocabulary, distances: Callable[[Sequence[str]], Tensor], generator: Generator
    ) -> list[int]:
        """The ids of the best individual. distances: of texts, (B,) on the CPU."""
        length = min(self.tokens, vocabulary.backbone.max_length - 2)
        population = torch.randint(len(vocabulary), (self.population, length), generator=generator)
        known: dict[tuple[int, ...], float] = {}  # most individuals of a generation were in the last one
        for number in range(self.generations):
            rows = list(map(tuple, population.tolist()))
            new = [row for row in dict.fromkeys(rows) if row not in known]
            scores = distances([vocabulary.text(torch.tensor(row)) for row in new]) if new else torch.zeros(0)
            known.update(zip(new, scores.tolist()))
            order = sorted(range(len(rows)), key=lambda place: known[rows[place]])
            population = population[order[: max(1, self.population // 2)]]
            if number < self.generations - 1:
                population = crossed(population, self.crossover, generator)
                population = mutated(population, self.mutation, len(vocabulary), generator)
        return vocabulary.ids_of(torch.tensor(min(known, key=lambda row: known[row])))


def concept_vector(backbone: Backbone, names: Sequence[NamedPrompt], anchor: str) -> Tensor:
    """(T, D): the mean of the states of the prompts minus those of the same prompts with the anchor in place of the
    name."""
    without = [named.text[: named.start] + anchor + named.text[named.end :] for named in names]
    with_it = backbone.encode([named.text for named in names]).states
    return (with_it - backbone.encode(without).states).mean(dim=0)


def distances(backbone: Backbone, texts: Sequence[str], goal: Tensor) -> Tensor:
    """(B,) on the CPU: the squared distance of each text's states from `goal` (T, D), over all rows."""
    return (backbone.encode(texts).states - goal).square().sum(dim=(1, 2)).cpu()


def crossed(parents: Tensor, rate: float, generator: Generator) -> Tensor:
    """The parents (P, n) and, after each one with the probability `rate`, two children: the first 0 ... n - 1 tokens of
    one and the others of another parent, and the reverse."""
    count, length = parents.shape
    found = []
    for parent in parents:
        found.append(parent)
        if float(torch.rand((), generator=generator)) < rate:
            other = parents[int(torch.randint(count, (), generator=generator))]
            point = int(torch.randint(length, (), generator=generator))
            found.append(torch.cat([parent[:point], other[point:]]))
            found.append(torch.cat([other[:point], parent[point:]]))
    return torch.stack(found)


def mutated(population: Tensor, rate: float, words: int, generator: Generator) -> Tensor:
    """The population (P, n); with the probability `rate` a random token of an individual is replaced by one of
    `words`."""
    population = population.clone()
    for individual in population:
        if float(torch.rand((), generator=generator)) < rate:
            place = int(torch.randint(len(individual), (), generator=generator))
            individual[place] = int(torch.randint(words, (), generator=generator))
    return population
