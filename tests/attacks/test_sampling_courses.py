"""Other courses of sampling: begun from latents, with a changed z_t, with more noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from realera.backbones import sampling
from realera.backbones.unet import UNetBackbone
from realera.contracts import Course, Sampler, UserError

SAMPLER = Sampler("ddim", steps=5, guidance_scale=5.0, height=32, width=32)
SEEDS = [3, 8]


@pytest.fixture(scope="module")
def backbone(tiny_sd: Path) -> UNetBackbone:
    return UNetBackbone("tiny", tiny_sd, SAMPLER)


def test_from_the_latents_of_a_step_it_goes_on_as_without_a_stop(backbone: UNetBackbone) -> None:
    states = backbone.encode(["a cat", "a dog"])
    whole = backbone.sample(states, SEEDS)
    for first in (0, 2, 5):
        begun = backbone.sample(states, SEEDS, stop_at=first)
        assert torch.equal(backbone.sample(states, SEEDS, course=Course(begun, first)), whole)


def test_the_change_sees_every_step_and_the_end(backbone: UNetBackbone) -> None:
    states = backbone.encode(["a cat", "a dog"])
    seen: dict[int, Tensor] = {}

    def noted(step: int, latents: Tensor) -> Tensor:
        seen[step] = latents
        return latents + 1 if step == 5 else latents

    end = backbone.sample(states, SEEDS, course=Course(change=noted))
    assert list(seen) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(seen[0], sampling.start_noise(SEEDS, (4, 8, 8)))
    assert torch.equal(end, seen[5] + 1) and torch.equal(seen[5], backbone.sample(states, SEEDS))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_eta_equals_that_of_diffusers(backbone: UNetBackbone, eta: float) -> None:
    states = backbone.encode(["a cat", "a dog"])
    empty = backbone.encode(["", ""])
    noise = sampling.SeededNoise(SEEDS, (4, 8, 8))
    scheduler = DDIMScheduler.from_config({**backbone.scheduler_config, "clip_sample": False})
    scheduler.set_timesteps(5)
    z = noise()
    with torch.no_grad():
        for t in scheduler.timesteps:
            none, own = (backbone.predict_noise(z, t.expand(2), one.states) for one in (empty, states))
            z = scheduler.step(none + 5.0 * (own - none), t, z, eta=eta, variance_noise=noise()).prev_sample
    assert torch.allclose(backbone.sample(states, SEEDS, course=Course(eta=eta)), z, atol=2e-4)


def test_the_noise_above_one_is_that_of_the_official_formula(backbone: UNetBackbone) -> None:
    """abs() of the direction's coefficient, and the factor on the fresh noise: one step by hand."""
    scheduler = sampling.scheduler_for(SAMPLER, backbone.scheduler_config)
    assert isinstance(scheduler, DDIMScheduler)
    z, predicted, fresh = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for t in scheduler.timesteps:
        course = Course(eta=1.85, variance=1.04)
        ours = scheduler.step(predicted, t, z).prev_sample
        ours = ours + sampling.noise_added(scheduler, t, predicted, fresh, course)
        before, after = int(t), int(t) - 200
        a = float(scheduler.alphas_cumprod[before])
        b = float(scheduler.alphas_cumprod[after] if after >= 0 else scheduler.final_alpha_cumprod)
        sigma = 1.85 * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        x0 = (z - (1 - a) ** 0.5 * predicted) / a**0.5
        byhand = b**0.5 * x0 + abs(1 - b - sigma**2) ** 0.5 * predicted + 1.04 * sigma * fresh
        assert torch.allclose(ours, byhand, atol=1e-4)


def test_courses_that_cannot_be_taken(backbone: UNetBackbone) -> None:
    states = backbone.encode(["a cat", "a dog"])
    with pytest.raises(UserError, match="setting of DDIM"):
        backbone.sample(states, SEEDS, replace(SAMPLER, scheduler="dpm++"), course=Course(eta=1.0))
    with pytest.raises(UserError, match="cannot begin at step 6 of 5"):
        backbone.sample(states, SEEDS, course=Course(first=6))
