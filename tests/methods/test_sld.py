"""SLD against the paper's equations, one number at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from options import built
from realera.contracts import UserError
from realera.methods.sld import INAPPROPRIATE, PRESETS, SafetyGuidance

SHAPE = (2, 3, 2, 2)


def predictions(steps: int, size: float = 0.03) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(uncond, cond, beside) of each step: differences on both sides of every preset's threshold and of the clamp."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            size * torch.randn(SHAPE, generator=generator),
            size * torch.randn(SHAPE, generator=generator),
            size * torch.randn((1, *SHAPE), generator=generator),
        )
        for _ in range(steps)
    ]


def slow(steps: list[tuple[Tensor, Tensor, Tensor]], numbers: tuple[float, ...], guidance_scale: float) -> list[float]:
    """The paper's equations for one element of the latents at a time, all steps of all elements."""
    warmup, scale, threshold, momentum_scale, beta = numbers
    count = steps[0][0].numel()
    nu = [0.0] * count
    made = []
    for step, (uncond, cond, beside) in enumerate(steps):
        for i in range(count):
            u, p, s = (float(x.flatten()[i]) for x in (uncond, cond, beside))
            phi = scale * (p - s)
            mu = min(1.0, abs(phi)) if p - s < threshold else 0.0
            gamma = mu * (s - u) + momentum_scale * nu[i]
            nu[i] = beta * nu[i] + (1 - beta) * gamma
            made.append(u + guidance_scale * (p - u - (gamma if step >= warmup else 0.0)))
    return made


def drawn(guide: SafetyGuidance, steps: list[tuple[Tensor, Tensor, Tensor]], guidance_scale: float = 7.5) -> Tensor:
    latents = torch.zeros(SHAPE)
    return torch.stack([guide(*given, latents, step, guidance_scale) for step, given in enumerate(steps)])


@pytest.mark.parametrize("strength", PRESETS)
def test_guidance_equals_the_papers_equations(strength: str) -> None:
    steps = predictions(20, size=0.03 if strength != "max" else 1.5)
    fast = drawn(SafetyGuidance("cat", strength=strength), steps)
    wanted = torch.tensor(slow(steps, PRESETS[strength], 7.5))
    torch.testing.assert_close(fast.flatten(), wanted, atol=1e-5, rtol=1e-5)
    plain = torch.stack([u + 7.5 * (p - u) for u, p, _ in steps])
    warm = PRESETS[strength][0]
    torch.testing.assert_close(fast[:warm], plain[:warm])
    assert all(not torch.allclose(a, b) for a, b in zip(fast[warm:], plain[warm:]))


def test_the_presets_are_the_papers() -> None:
    """Section 3: delta, s_S, lambda, s_m, beta_m. Weak's s_S is the paper's, not diffusers' 20."""
    assert PRESETS == {
        "weak": (15, 200, 0, 0, 0),
        "medium": (10, 1000, 0.01, 0.3, 0.4),
        "strong": (7, 2000, 0.025, 0.5, 0.7),
        "max": (0, 5000, 1, 0.5, 0.7),
    }


@pytest.mark.parametrize(
    ("strength", "at", "typed"),
    [
        ("weak", "scale", 20.0),  # diffusers' SafetyConfig
        ("medium", "warmup", 0),  # re-implementations that compare delta with the diffusion time
        ("medium", "threshold", 0.04),
        ("medium", "momentum_scale", 0.0),
        ("medium", "momentum_beta", 0.9),
    ],
)
def test_a_given_number_replaces_the_presets(
    strength: str, at: str, typed: float, load_method: Callable[..., Any]
) -> None:
    names = ("warmup", "scale", "threshold", "momentum_scale", "momentum_beta")
    numbers = tuple(typed if name == at else number for name, number in zip(names, PRESETS[strength]))
    steps = predictions(20)
    overrides = (f"guide.strength={strength}", f"guide.{at}={typed}", "guide.steps=50")
    found = drawn(load_method("sld", *overrides).guide, steps).flatten()
    torch.testing.assert_close(found, torch.tensor(slow(steps, numbers, 7.5)), atol=1e-5, rtol=1e-5)
    assert (found - torch.tensor(slow(steps, PRESETS[strength], 7.5))).abs().max() > 0.01


def test_the_comparison_is_signed() -> None:
    """There is no guidance where the prompt's noise exceeds the text's, and there is where it is below by the same."""
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    guide = SafetyGuidance("cat", warmup=0)
    assert float(guide(zero, 2 * one, one[None], zero, 0, 7.5)) == 15.0
    assert float(guide(zero, zero, one[None], zero, 0, 7.5)) == -7.5


def test_momentum_is_each_images_own_and_ends_with_its_batch() -> None:
    steps = predictions(5)
    guide = SafetyGuidance("cat", strength="max")
    first = drawn(guide, steps)
    assert torch.equal(drawn(guide, steps), first)
    alone = [tuple(x[..., 1:, :, :, :] for x in given) for given in steps]
    torch.testing.assert_close(drawn(guide, alone), first[:, 1:])  # type: ignore[arg-type]


def test_warm_up_is_counted_in_fifty_steps() -> None:
    assert [SafetyGuidance("cat", strength=s).warmup for s in PRESETS] == [15, 10, 7, 0]
    assert [SafetyGuidance("cat", strength=s, steps=20).warmup for s in PRESETS] == [6, 4, 3, 0]
    assert SafetyGuidance("cat", steps=20, warmup=11).warmup == 11


def test_the_safety_text() -> None:
    assert SafetyGuidance(["gun", "knife"]).prompts == ("gun, knife",)
    assert SafetyGuidance("nudity", safety_text="paper").prompts == (INAPPROPRIATE,)
    assert SafetyGuidance("nudity", safety_text="blood").prompts == ("blood",)
    assert len(INAPPROPRIATE.split(", ")) == 20


def test_images_are_drawn_away_from_the_concept(
    new_backbone: Callable[..., Any], load_method: Callable[..., Any]
) -> None:
    """With the yaml's settings; the result does not depend on earlier draws or on the batch."""
    from realera.evaluation.generate import source_of

    backbone, guide = new_backbone(), load_method("sld", "guide.warmup=0").guide
    texts = ["a photo of a cat", "a dog"]
    plain = backbone.generate(texts, [1, 2])
    guided = backbone.generate(texts, [1, 2], guide=guide)
    assert not torch.equal(plain, guided)
    assert torch.equal(backbone.generate(texts, [1, 2], guide=guide), guided)
    one = backbone.generate(texts[:1], [1], guide=guide)[0].int() - guided[0].int()
    assert one.abs().max() <= 1
    assert backbone.erased_state() == {}
    others = (load_method("sld", "guide.warmup=1").guide, None, SafetyGuidance("dog"))
    ids = [source_of(backbone, guide=g) for g in (guide, *others)]
    assert len(set(ids)) == 4
    assert source_of(backbone, guide=load_method("sld", "guide.warmup=0").guide) == ids[0]


@pytest.mark.parametrize(
    "settings",
    [{"strength": "hyper"}, {"warmup": -1}, {"scale": -1}, {"momentum_beta": 1}, {"steps": 0}, {"safety_text": " "}],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(SafetyGuidance, **{"concepts": "cat", **settings})


def test_nothing_to_guide_away_from_is_refused() -> None:
    with pytest.raises(UserError, match="name a concept"):
        SafetyGuidance()
