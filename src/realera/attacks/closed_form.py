"""The adversary of RECE (arXiv 2407.12383) against any erased model: the text states that the erased W_K and W_V read
as the unedited ones read the prompt's own.

For a row h of the prompt's states and layers i with weights W_i (erased) and V_i (unedited), the row

    h' = argmin sum_i ||W_i h' - V_i h||^2 + lambda ||h'||^2 = (sum_i W_i^T W_i + lambda I)^-1 (sum_i W_i^T V_i) h

is found in closed form, in one D x D matrix for all rows. The official code inverts the first sum with the same term.
Where an erasure did not change W_K and W_V, h' is nearly h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from realera.attack_contract import Attacked, Attempt, Case
from realera.contracts import Backbone
from realera.setting_types import Batch, Positive


class ClosedForm:
    """lambda_norm: lambda, in squared norms of the weights; a small one allows large states. together: prompts drawn at
    once. info: apart = ||W h' - V h|| / ||V h|| over all rows and layers, and of the prompt's own states (before)."""

    counts_plain = False

    def __init__(self, lambda_norm: Positive = 0.1, together: Batch = 1) -> None:
        self.lambda_norm = lambda_norm
        self.together = together

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return per_image

    @staticmethod
    def passes_of_search(settings: Mapping[str, Any], per_image: float) -> float:
        return 0.0

    def search(self, attacked: Attacked) -> Mapping[str, Tensor]:
        """{"map" (D, D) float64: A with h' = A h; "erased", "between", "unedited" (D, D): sums of W^T W, W^T V and
        V^T V}. Adapters that a guide weights by the prompt have the weights of the concept's first prompt."""
        backbone = attacked.backbone
        text = attacked.prompts[0].text
        with backbone.original():
            unedited = weights(backbone)
        with attacked.acting([text]):
            erased = weights(backbone)
        grams = {
            "erased": gram(erased, erased),
            "between": gram(erased, unedited),
            "unedited": gram(unedited, unedited),
        }
        system = grams["erased"] + self.lambda_norm * torch.eye(backbone.width, dtype=torch.float64)
        return {"map": torch.linalg.solve((system + system.T) / 2, grams["between"]), **grams}

    def __call__(self, case: Case) -> Mapping[str, Any]:
        return self.attack_together([case])[0]

    def attack_together(self, cases: Sequence[Case]) -> Sequence[Mapping[str, Any]]:
        found = cases[0].searched
        attempts, infos = [], []
        for case in cases:
            with case.backbone.original():
                own = case.backbone.encode([case.prompt.text])
            rows = own.states[0].to("cpu", torch.float64)
            made = rows @ found["map"].T
            attempts.append(
                Attempt(
                    case.prompt.text,
                    states=replace(own, states=made[None].to(own.states)),
                    said=f"text states in place of those of “{case.prompt.text}”",
                )
            )
            infos.append({"before": apart(rows, rows, found), "apart": apart(made, rows, found)})
        cases[0].draw_all(cases, attempts)
        return infos


@torch.no_grad()
def weights(backbone: Backbone) -> list[Tensor]:
    """(out, D) float64 on the CPU of every layer that reads text states: as the model applies them now, adapters
    included."""
    parameter = next(backbone.denoiser.parameters())
    unit = torch.eye(backbone.width, device=parameter.device)[None]
    found = []
    for name, base in backbone.text_projections().items():
        layer = backbone.denoiser.get_submodule(name)
        read: Tensor = layer(unit.to(base.weight.dtype))[0]
        bias: Tensor | None = getattr(base, "bias", None)
        found.append((read if bias is None else read - bias).T.to("cpu", torch.float64))
    return found


def gram(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """sum_i L_i^T R_i, (D, D)."""
    return sum((one.T @ other for one, other in zip(left, right)), torch.zeros((), dtype=torch.float64))


def apart(made: Tensor, own: Tensor, found: Mapping[str, Tensor]) -> float:
    """sqrt(sum_i ||W_i x - V_i h||^2 / sum_i ||V_i h||^2) over all rows x of `made` and h of `own` (n, D)."""
    goal = float((own @ found["unedited"] * own).sum())
    squared = float((made @ found["erased"] * made).sum()) - 2 * float((made @ found["between"] * own).sum()) + goal
    return math.sqrt(max(0.0, squared) / goal)
