"""RECE (arXiv 2407.12383): UCE, then rounds of attack and erasure. The attack finds the text states that bring the
erased concept back, and an edit erases them, both in closed form.

With W0 the weights as loaded and W = W0 M the current weights (every layer has the same map M), a round finds for every
row h of the concept's name

    h' = argmin sum_l ||W_l h' - W0_l h||^2 + lambda ||h'||^2 = (M^T G M + lambda I)^-1 M^T G h

with G = sum_l W0_l^T W0_l, and edits W as UCE would, so that h' gets the guide's output: M <- M M' with M' the map of
that edit of W. Letters: h (T, D), one row per token; l all cross-attention keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from torch import Tensor

from realera.closed_form import NormalEquations, compose
from realera.contracts import Backbone, Edit, Editor, Neighbours, Pair, UserError
from realera.methods.priors import Preserve, kept_texts
from realera.methods.priors import gram_of as gram_of_texts
from realera.setting_types import AnyText, NonNegative, Number, Positive

Rounds = Annotated[int, Number(0, 1000, whole=True)]


class RobustErasure:
    """UCE made robust against text states that are optimised to bring the concept back.

    start: the first edit, which must give a map (the paper: UCE). rounds: of attack and erasure (the paper's epochs).
    guide: the text to which the attack's states are mapped, row by row; None = each concept's anchor. lambda_norm:
    weight of ||h'||^2, in squared norms of the weights; a small weight allows large h'. preserve: texts to preserve
    with all their rows, or "artists" (then '' too, as in the official code; `priors.Preserve`). preserve_scale: weight
    of a preserved row, against erase_scale of an erased one. ridge: weight of ||W M' - W||^2 in a round. All rows
    count, including BOS (official).

    The official code keeps the round after which a detector finds the concept least; this class does not choose.
    """

    def __init__(
        self,
        start: Editor,
        rounds: Rounds = 1,
        guide: AnyText | None = " ",
        lambda_norm: Positive = 0.1,
        erase_scale: Positive = 1.0,
        preserve: Preserve = (" ",),
        preserve_scale: NonNegative = 0.1,
        ridge: NonNegative = 0.1,
    ) -> None:
        self.start = start
        self.rounds = rounds
        self.guide = guide
        self.lambda_norm = lambda_norm
        self.erase_scale = erase_scale
        self.preserve = preserve
        self.preserve_scale = preserve_scale
        self.ridge = ridge

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit:
        """One map. Only the pairs' names are used. info: of the last round's solve, and `attack_<round>`: the distance
        between that round's attack and the concept, ||W h' - W0 h|| / ||W0 h|| over all rows and layers."""
        first = self.start(backbone, pairs, neighbours)
        if first.map is None:
            raise UserError("method.edit.start gives no map: use UCE.")
        solution, info = first.map.double(), {f"start_{name}": value for name, value in first.info.items()}
        gram = gram_of(layer.weight for layer in backbone.text_projections().values())
        concepts = _rows(backbone, [pair.concept.target for pair in pairs])
        guides = _rows(backbone, [pair.concept.anchor if self.guide is None else self.guide for pair in pairs])
        texts = kept_texts(self.preserve, pairs)
        kept = gram_of_texts(backbone, ["", *texts] if self.preserve == "artists" else texts)
        for number in range(1, self.rounds + 1):
            found = concepts @ attack(solution, gram, self.lambda_norm).T
            info[f"attack_{number}"] = relative_distance(found @ solution.T, concepts, gram)
            sums = NormalEquations(backbone.width).add_pairs(found, guides, self.erase_scale)
            sums.add_moments(kept, kept, self.preserve_scale)
            step, solved = sums.solve(self.ridge)
            solution = compose(step, solution)
            info.update(solved)
        return Edit(map=solution, info=info)


def gram_of(weights: Iterable[Tensor]) -> Tensor:
    """G = sum W^T W of weights (out, D), (D, D) float64 on the CPU."""
    doubles = (weight.detach().to("cpu", torch.float64) for weight in weights)
    grams = (weight.T @ weight for weight in doubles)  # one at a time: SDXL has 140 of 34 MB each
    return sum(grams, torch.zeros((), dtype=torch.float64))


def attack(map: Tensor, gram: Tensor, lambda_norm: float) -> Tensor:
    """A (D, D) float64 with h' = A h, the state that comes nearest to h through weights W = W0 map."""
    reach = map.T @ gram
    system = reach @ map + lambda_norm * torch.eye(len(map), dtype=torch.float64)
    return torch.cholesky_solve(reach, torch.linalg.cholesky((system + system.T) / 2))


def relative_distance(states: Tensor, goals: Tensor, gram: Tensor) -> float:
    """||W0 x - W0 h|| / ||W0 h|| over all rows (n, D) and the layers that `gram` sums."""

    def squared(rows: Tensor) -> float:
        return float((rows @ gram * rows).sum())

    return math.sqrt(squared(states - goals) / squared(goals))


def _rows(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """All rows of all texts (n T, D), float64 on the CPU."""
    return backbone.encode(texts).states.flatten(0, 1).to("cpu", torch.float64)
