from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from torch import Tensor

from guides import By
from quick import slow_unless
from realera.backbones import sampling
from realera.backbones.unet import UNetBackbone
from realera.contracts import Edit, LoraSpec, Sampler, UserError

SAMPLER = Sampler("ddim", steps=4, guidance_scale=5.0, height=32, width=32)
TEXTS, SEEDS = ["a photo of a cat", "an airplane in the sky"], [3, 8]


@pytest.fixture(scope="module")
def backbone(tiny_sd: Path) -> UNetBackbone:
    return UNetBackbone("tiny", tiny_sd, SAMPLER)


@pytest.mark.parametrize(
    ("name", "prediction"),
    slow_unless(
        product(["ddim", "dpm++"], ["epsilon", "v_prediction"]), ("ddim", "epsilon"), ("dpm++", "v_prediction")
    ),
)
def test_images_equal_those_of_the_diffusers_pipeline(
    tiny_sd: Path, tmp_path: Path, name: str, prediction: str
) -> None:
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": prediction}))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    kind = DDIMScheduler if name == "ddim" else DPMSolverMultistepScheduler
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    backbone = UNetBackbone("tiny", folder, replace(SAMPLER, scheduler=name))
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 32, "width": 32}
    expected = pipeline(TEXTS, latents=sampling.start_noise(SEEDS, (4, 8, 8)), output_type="np", **settings).images
    images = backbone.generate(TEXTS, SEEDS)
    assert images.shape == (2, 32, 32, 3) and images.dtype == torch.uint8
    assert (images / 255 - torch.from_numpy(expected)).abs().max() < 1.01 / 255
    assert images.float().std() > 5  # an image, not one colour


def test_images_do_not_depend_on_the_batch_size(backbone: UNetBackbone) -> None:
    states = backbone.encode(TEXTS)
    both = backbone.sample(states, SEEDS)
    for row in range(2):
        alone = backbone.sample(backbone.encode([TEXTS[row]]), [SEEDS[row]])
        torch.testing.assert_close(alone[0], both[row], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, backbone.sample(states, [3, 9]), atol=1e-2)


def test_same_seed_same_latents_bit_for_bit(backbone: UNetBackbone) -> None:
    states = backbone.encode(TEXTS)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert torch.equal(backbone.sample(states, SEEDS), backbone.sample(states, SEEDS))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_stop_at(backbone: UNetBackbone, name: str) -> None:
    sampler, states = replace(SAMPLER, scheduler=name), backbone.encode(TEXTS)
    seen: list[Tensor] = []

    def spy(uncond: Tensor, cond: Tensor, beside: Tensor, latents: Tensor, step: int, scale: float) -> Tensor:
        assert step == len(seen) and len(beside) == 0
        seen.append(latents.clone())
        return uncond + scale * (cond - uncond)

    whole = backbone.sample(states, SEEDS, sampler, guide=By(spy))
    assert torch.equal(whole, backbone.sample(states, SEEDS, sampler))
    assert torch.equal(whole, backbone.sample(states, SEEDS, sampler, stop_at=4))
    assert torch.equal(seen[0], sampling.start_noise(SEEDS, (4, 8, 8)))
    for step in range(4):
        assert torch.equal(backbone.sample(states, SEEDS, sampler, stop_at=step), seen[step])
    for step in (-1, 5):
        with pytest.raises(ValueError, match="stop_at"):
            backbone.sample(states, SEEDS, sampler, stop_at=step)


def test_timesteps_are_those_given_to_the_unet(backbone: UNetBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    forward = backbone.unet.forward

    def spy(x: Tensor, timestep: Tensor, **rest: Any) -> Any:
        asked.append(int(timestep))
        return forward(x, timestep, **rest)

    monkeypatch.setattr(backbone.unet, "forward", spy)
    states = backbone.encode(TEXTS)
    for sampler in (SAMPLER, replace(SAMPLER, scheduler="dpm++", steps=3)):
        del asked[:]
        backbone.sample(states, SEEDS, sampler)
        assert backbone.timesteps(sampler).tolist() == asked
    assert backbone.timesteps().tolist() == [751, 501, 251, 1]


def test_no_guidance_skips_the_unconditional_pass(backbone: UNetBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    states = backbone.encode(TEXTS)
    sizes: list[int] = []
    forward = backbone.unet.forward

    def spy(x: Tensor, *rest: Any, **named: Any) -> Any:
        sizes.append(len(x))
        return forward(x, *rest, **named)

    monkeypatch.setattr(backbone.unet, "forward", spy)
    plain = backbone.sample(states, SEEDS, replace(SAMPLER, guidance_scale=1.0))
    assert sizes == [2] * 4
    only_cond = backbone.sample(states, SEEDS, SAMPLER, guide=By(lambda uncond, cond, *_: cond))
    assert sizes[4:] == [4] * 4
    torch.testing.assert_close(plain, only_cond, atol=1e-4, rtol=1e-4)


def test_a_pndm_config_does_not_clip_latents() -> None:
    config = dict(
        PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).config
    )
    scheduler = sampling.scheduler_for(replace(SAMPLER, steps=1), config)
    far = torch.full((1, 4, 2, 2), 50.0)
    assert scheduler.step(torch.zeros_like(far), scheduler.timesteps[0], far).prev_sample.abs().min() > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": "euler"}, "ddim or dpm"),
        ({"steps": 0}, "1 to 1000"),
        ({"steps": 1001}, "1 to 1000"),
        ({"height": 30}, "multiples of 4"),
        ({"width": 0}, "multiples of 4"),
    ],
)
def test_bad_sampler(backbone: UNetBackbone, change: dict[str, int | str], message: str) -> None:
    bad = replace(SAMPLER, **change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        backbone.sample(backbone.encode(TEXTS), SEEDS, bad)
    with pytest.raises(UserError, match=message):
        backbone.generate(TEXTS, SEEDS, bad)


def test_each_prompt_needs_a_seed(backbone: UNetBackbone) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        backbone.generate(TEXTS, [1])


def test_forward_noise(backbone: UNetBackbone) -> None:
    """sqrt(abar_t) x + sqrt(1 - abar_t) noise over SD's scaled-linear betas (arXiv 2112.10752, appendix)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    x, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([0, 500, 999])
    level = abar[timesteps].view(3, 1, 1, 1)
    expected = (level.sqrt() * x + (1 - level).sqrt() * noise).float()
    torch.testing.assert_close(backbone.noisy_latents(x, noise, timesteps), expected, atol=1e-5, rtol=1e-5)


def test_a_guide_gets_the_noise_of_its_own_texts(backbone: UNetBackbone) -> None:
    """The guide gets the noise of its own texts for each prompt, equal to separate predictions."""
    states, texts = backbone.encode(TEXTS), ["a dog", "the sky"]

    def rule(uncond: Tensor, cond: Tensor, beside: Tensor, latents: Tensor, step: int, scale: float) -> Tensor:
        assert beside.shape == (2, *latents.shape)
        t = backbone.timesteps(SAMPLER)[step]
        for i, text in enumerate(texts):
            alone = backbone.predict_noise(latents, t, backbone.encode([text] * len(latents)).states)
            torch.testing.assert_close(beside[i], alone, atol=1e-4, rtol=1e-4)
        return beside[0]

    guide = By(rule, texts)
    with torch.no_grad():
        drawn = backbone.generate(TEXTS, SEEDS, SAMPLER, guide)
    assert guide.drawn == [list(TEXTS)]
    alone = backbone.generate(["a dog"] * len(SEEDS), SEEDS, replace(SAMPLER, guidance_scale=1.0))
    assert (drawn.int() - alone.int()).abs().max() <= 1
    assert len(states.states) == len(TEXTS)


@pytest.mark.quick(2)
@pytest.mark.parametrize("drawn", ["guided", "unguided", "adapted", "scaled", "recorded"])
def test_keys_and_values_are_computed_once_and_images_are_equal(
    drawn: str, new_backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W_K and W_V are applied to the text only in the first step, and again after every edit."""
    backbone = new_backbone()
    sampler = replace(SAMPLER, guidance_scale=1.0 if drawn == "unguided" else 5.0)
    if drawn in ("adapted", "scaled"):
        for parameter in backbone.add_adapter(LoraSpec(rank=2, per_concept=True), torch.Generator(), concepts=2):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    first = next(iter(backbone.text_projections().values()))
    applied, plainly = [], first.forward
    first.forward = lambda states: (applied.append(1), plainly(states))[1]

    def sample() -> Tensor:
        with ExitStack() as around:
            if drawn == "scaled":
                around.enter_context(backbone.adapter_scale(torch.tensor([[1.0, 0.0], [0.2, 2.0]])))
            if drawn == "recorded":
                around.enter_context(backbone.attention())
            return backbone.sample(backbone.encode(TEXTS), SEEDS, sampler)

    def both() -> tuple[Tensor, Tensor]:
        quick = sample()
        with monkeypatch.context() as patch:
            patch.setattr(backbone._denoise, "with_cached_text", lambda: backbone._denoise)
            return quick, sample()

    quick, plain = both()
    assert torch.equal(quick, plain) and len(applied) == 1 + SAMPLER.steps
    backbone.apply(Edit(map=0.5 * torch.eye(32, dtype=torch.float64)))
    after, plain = both()
    assert torch.equal(after, plain) and not torch.equal(after, quick)
    assert [module for module in backbone.unet.modules() if "forward" in vars(module)] == [first]
