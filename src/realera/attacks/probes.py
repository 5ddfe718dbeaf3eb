"""Three probes of arXiv 2505.17013, which search nothing: part of an image is given, the first steps are the unedited
model's, or more noise is added while drawing. An erasure that only leads the sampler away lets the concept through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Annotated, Any

import torch
from torch import Tensor

from realera.attack_contract import Attempt, Case
from realera.contracts import Course
from realera.setting_types import Filled, NonNegative, Number, Whole

HiddenShare = Annotated[float, Number(0, 1, above=True)]
Seeds = 2**62


class Inpaint:
    """The unedited model's image of the prompt is given around its centre, and the system draws the centre. hidden: the
    centre's share of each side. At every step the known part is put back, with the start's noise at the level of that
    step, and without noise after the last step."""

    counts_plain = False

    def __init__(self, hidden: HiddenShare = 0.5) -> None:
        self.hidden = hidden

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return per_image

    def __call__(self, case: Case) -> Mapping[str, Any]:
        known = KnownAround(case, self.hidden)
        case.draw([Attempt(case.prompt.text)], course=Course(change=known))
        return {"hidden": float(known.mask.float().mean())}


class KnownAround:
    """`Course.change`: puts the known part of an image back. mask (h, w): true where the system draws."""

    def __init__(self, case: Case, hidden: float) -> None:
        self.backbone = case.backbone
        self.latents = case.image_latents()
        self.timesteps = case.backbone.timesteps(case.sampler)
        self.mask = centre(self.latents.shape[-2], self.latents.shape[-1], hidden).to(self.latents.device)
        self.noise: Tensor | None = None

    def __call__(self, step: int, latents: Tensor) -> Tensor:
        if self.noise is None:  # step 0: pure noise
            self.noise = latents.clone()
        known = self.latents.expand_as(latents)
        if step < len(self.timesteps):
            at = self.timesteps[step].expand(len(latents)).to(latents.device)
            known = self.backbone.noisy_latents(known, self.noise, at)
        return torch.where(self.mask, latents, known)


def centre(height: int, width: int, share: float) -> Tensor:
    """(height, width) bool: a centred rectangle of this share of each side, of at least one latent."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    rows, columns = (max(1, round(share * side)) for side in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    mask[top : top + rows, left : left + columns] = True
    return mask


class Complete:
    """The unedited model draws the first steps, and the system the others. steps: numbers of steps that the unedited
    model draws, tried in this order until one succeeds. (The official `interrupt_steps` 0, 1, 2 count from 0: they are
    1, 2, 3 here.)"""

    counts_plain = False

    def __init__(self, steps: Annotated[Sequence[Whole], Filled()] = (1, 2, 3)) -> None:
        self.steps = list(steps)

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return len(settings.get("steps") or (1, 2, 3)) * per_image

    def __call__(self, case: Case) -> Mapping[str, Any]:
        text, seed, sampler = case.prompt.text, case.prompt.seed, case.sampler
        for first in (min(step, sampler.steps) for step in self.steps):
            with case.backbone.original():
                latents = case.backbone.sample(case.backbone.encode([text]), [seed], sampler, stop_at=first)
            if case.draw([Attempt(text)], step=first, course=Course(latents, first))[0]:
                break
        return {}


class Noise:
    """DDIM with more noise than it was trained for: every combination of `etas` and `variances` (`contracts.Course`) is
    drawn, from a seed of its own, until one succeeds. The first has the prompt's seed."""

    counts_plain = False
    needs_ddim = True

    def __init__(
        self,
        etas: Annotated[Sequence[NonNegative], Filled()] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85),
        variances: Annotated[Sequence[NonNegative], Filled()] = (1.0, 1.02, 1.03, 1.04),
    ) -> None:
        self.etas, self.variances = list(etas), list(variances)

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return len(settings.get("etas") or range(6)) * len(settings.get("variances") or range(4)) * per_image

    def __call__(self, case: Case) -> Mapping[str, Any]:
        sampler = replace(case.sampler, scheduler="ddim")
        for number, (eta, variance) in enumerate(product(self.etas, self.variances)):
            seed = int(torch.randint(Seeds, (1,), generator=case.generator)) if number else case.prompt.seed
            attempt = Attempt(case.prompt.text, seed=seed)
            if case.draw([attempt], step=number, sampler=sampler, course=Course(eta=eta, variance=variance))[0]:
                return {"eta": eta, "variance": variance}
        return {}
