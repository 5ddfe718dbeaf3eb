"""Flow matching: z_t = (1 - sigma) x + sigma noise, and the network predicts the velocity noise - x.

The noise level sigma in (0, 1] is the timestep. A schedule is shifted towards noise,

    sigma(u) = s u / (1 + (s - 1) u),    u in [0, 1],

with a shift s that is fixed (Stable Diffusion 3: 3; arXiv 2403.03206, section 5.3.2) or grows with the number of image
tokens (FLUX.1 dev: s = exp(mu)). Sampling takes Euler steps along the velocity, as FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Generator, Tensor

from realera.backbones.sampling import USUAL, joined, known
from realera.contracts import Course, Guide, Sampler, TextStates

LEAST = 1e-3  # the least noise level that a method asks for: at 0 there is nothing to predict
Predict = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(latents (B, C, h, w), sigma (), states (B, T, D), pooled (B, E)) -> the velocity (B, C, h, w)"""


class FlowSchedule:
    """A checkpoint's noise levels. config: of its scheduler. patch: pixels of an image token, on each side. even: the
    levels before the shift are 1, 1 - 1 / n, ..., 1 / n (FLUX), not the scheduler's own."""

    def __init__(self, config: Mapping[str, Any], patch: int, even: bool) -> None:
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_config(known(FlowMatchEulerDiscreteScheduler, config))
        self.patch = patch
        self.even = even

    def sigmas(self, sampler: Sampler) -> Tensor:
        """(steps + 1,) float32, falling from the first step's level to 0."""
        levels = {"sigmas": [1 - i / sampler.steps for i in range(sampler.steps)]} if self.even else {}
        self._scheduler.set_timesteps(sampler.steps, mu=self._mu(sampler), **levels)
        found: Tensor = self._scheduler.sigmas.clone()
        return found

    def at(self, shares: Tensor, sampler: Sampler) -> Tensor:
        """The levels sigma(u), float32, at shares u of the schedule; at least `LEAST`."""
        shift = self.shift(sampler)
        u = shares.double().clamp(LEAST, 1.0)
        return (shift * u / (1 + (shift - 1) * u)).float()

    def draw(self, count: int, sampler: Sampler, generator: Generator) -> Tensor:
        """(count,) sigma(u), u logit-normal: the law that Stable Diffusion 3 was trained with (its section 3.1). FLUX's
        is not published."""
        return self.at(torch.randn(count, generator=generator).sigmoid(), sampler)

    def shift(self, sampler: Sampler) -> float:
        """s for this sampler's image size."""
        mu = self._mu(sampler)
        if mu is None:
            return float(self._scheduler.config.shift)
        return mu if self._scheduler.config.time_shift_type == "linear" else math.exp(mu)

    def _mu(self, sampler: Sampler) -> float | None:
        """The shift's logarithm, linear in the number of image tokens; None if the shift is fixed."""
        config = self._scheduler.config
        if not config.use_dynamic_shifting:
            return None
        tokens = (sampler.height // self.patch) * (sampler.width // self.patch)
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + slope * (tokens - config.base_image_seq_len))


def noised(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """(1 - sigma) latents + sigma noise; sigmas (B,)."""
    sigma = sigmas.to(latents).view(-1, 1, 1, 1)
    return (1 - sigma) * latents + sigma * noise


def sample(
    predict: Predict,
    sigmas: Tensor,
    latents: Tensor,
    cond: TextStates,
    uncond: TextStates | None,
    guidance_scale: float,
    guide: Guide | None,
    beside: TextStates | None,
    stop_at: int | None,
    each_step: Callable[[int], None] | None = None,
    course: Course = USUAL,
) -> Tensor:
    """Latents after all steps, or before step `stop_at`: z <- z + (sigma' - sigma) v for each level sigma and the next
    sigma'. cond, beside, guide, each_step, course: as in `sampling.sample`. uncond: one empty or negative prompt for
    all; None: v is the prediction for the prompts alone."""
    states, pooled = (cond.states, cond.pooled) if uncond is None else joined(cond, uncond, beside)
    parts = len(states) // max(1, len(cond.states))
    if course.latents is not None:
        latents = course.latents.to(latents).expand_as(latents)
    steps = list(enumerate(zip(sigmas[:-1][:stop_at], sigmas[1:])))
    for step, (sigma, after) in steps[course.first :]:
        if each_step is not None:
            each_step(step)
        if course.change is not None:
            latents = course.change(step, latents)
        outputs = predict(latents.repeat(parts, 1, 1, 1), sigma, states, pooled).unflatten(0, (parts, -1))
        if guide is not None:
            velocity = guide(outputs[0], outputs[1], outputs[2:], latents, step, guidance_scale)
        elif uncond is not None:
            velocity = outputs[0] + guidance_scale * (outputs[1] - outputs[0])
        else:
            velocity = outputs[0]
        latents = latents + float(after - sigma) * velocity
    return latents if course.change is None else course.change(len(steps), latents)
