"""Stable Diffusion 2.1: v-prediction, other padding, attention in float32, and the older tokenizer files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor

import folders
from guides import By
from realera.backbones import sampling
from realera.backbones.text import padded_ids
from realera.backbones.unet import UNetBackbone
from realera.contracts import Edit, NamedPrompt, Sampler, UserError

SAMPLER = Sampler("ddim", steps=3, guidance_scale=7.5, height=64, width=64)
TEXTS, SEEDS = ["a photo of a cat", "an airplane in the sky"], [3, 8]


@pytest.fixture(scope="module")
def backbone(tiny_sd21: Path) -> UNetBackbone:
    return UNetBackbone("sd21", tiny_sd21, SAMPLER)


def ask(backbone: UNetBackbone, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z_t, the raw output v, and the noise."""
    states = backbone.encode(TEXTS).states
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    v = backbone._denoise(latents, timesteps, states, None)
    return latents, v, backbone.predict_noise(latents, timesteps, states)


@pytest.mark.quick(1)
@pytest.mark.parametrize("change", [{}, {"scheduler": "dpm++"}, {"height": 48, "width": 80}])
def test_images_equal_those_of_the_diffusers_pipeline(
    tiny_sd21: Path, backbone: UNetBackbone, change: dict[str, Any]
) -> None:
    sampler = replace(SAMPLER, **change)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd21)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    if sampler.scheduler == "dpm++":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        TEXTS,
        latents=sampling.start_noise(SEEDS, (4, sampler.height // 8, sampler.width // 8)),
        output_type="np",
        num_inference_steps=3,
        guidance_scale=7.5,
        height=sampler.height,
        width=sampler.width,
    ).images
    images = backbone.generate(TEXTS, SEEDS, sampler)
    assert (images / 255 - torch.from_numpy(expected)).abs().max() < 1.01 / 255
    assert images.float().std() > 5


def test_v_is_converted_to_noise_as_in_the_scheduler(tiny_sd21: Path, backbone: UNetBackbone) -> None:
    scheduler = DDIMScheduler.from_pretrained(tiny_sd21 / "scheduler")
    scheduler.set_timesteps(1000)
    for t in (1, 500, 999):
        latents, v, noise = ask(backbone, torch.tensor(t))
        x0 = scheduler.step(v, torch.tensor(t), latents).pred_original_sample
        # The scheduler's own x0, noised with our noise, is z_t again.
        again = scheduler.add_noise(x0, noise, torch.tensor([t, t]))
        torch.testing.assert_close(again, latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            backbone._schedule.output_of(noise, latents, torch.tensor(t)), v, atol=1e-4, rtol=1e-4
        )


def test_v_of_the_true_noise_is_the_true_noise(backbone: UNetBackbone) -> None:
    """From v = sqrt(abar) noise - sqrt(1 - abar) x0, as in diffusers' get_velocity, the noise of each image follows."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    t = torch.tensor([0, 400, 999])
    v = DDIMScheduler.from_config(backbone.scheduler_config).get_velocity(x0, noise, t)
    latents = backbone.noisy_latents(x0, noise, t)
    torch.testing.assert_close(backbone._schedule.noise_of(v, latents, t), noise, atol=1e-5, rtol=1e-5)


def test_noise_differs_from_v(backbone: UNetBackbone) -> None:
    latents, v, noise = ask(backbone, torch.tensor([999, 0]))
    assert (v - noise).abs().max() > 0.1  # another quantity than v
    assert (noise[0] - latents[0]).abs().mean() < 0.2  # nearly all of z_999 is noise
    assert noise.dtype == torch.float32


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_a_guide_gets_and_returns_noise(backbone: UNetBackbone, name: str) -> None:
    states, sampler, seen = backbone.encode(TEXTS), replace(SAMPLER, scheduler=name), []

    def rule(uncond: Tensor, cond: Tensor, beside: Tensor, latents: Tensor, step: int, scale: float) -> Tensor:
        t = backbone.timesteps(sampler)[step]
        expected = backbone.predict_noise(latents, t, states.states)
        torch.testing.assert_close(cond, expected, atol=1e-4, rtol=1e-4)
        seen.append(step)
        return uncond + 7.5 * (cond - uncond)

    by_guide = backbone.sample(states, SEEDS, sampler, guide=By(rule))
    assert seen == [0, 1, 2]
    torch.testing.assert_close(by_guide, backbone.sample(states, SEEDS, sampler), atol=1e-3, rtol=1e-3)


def with_scheduler(source: Path, to: Path, **change: Any) -> Path:
    folder = folders.copied(source, to)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder


def test_a_guide_is_refused_with_zero_terminal_snr(tiny_sd21: Path, tmp_path: Path) -> None:
    change = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    blind = UNetBackbone("sd21", with_scheduler(tiny_sd21, tmp_path / "sd", **change), SAMPLER)
    states = blind.encode(TEXTS)
    assert blind.sample(states, SEEDS).isfinite().all()
    latents, _, noise = ask(blind, torch.tensor(999))
    assert torch.equal(noise, latents)
    with pytest.raises(UserError, match="zero terminal SNR"):
        blind.sample(states, SEEDS, guide=By(lambda uncond, cond, *_: cond))


def test_other_predictions_are_refused(tiny_sd21: Path, tmp_path: Path) -> None:
    folder = with_scheduler(tiny_sd21, tmp_path / "sd", prediction_type="sample")
    with pytest.raises(UserError, match="predicts 'sample'"):
        UNetBackbone("sd21", folder, SAMPLER)


def test_rows_with_its_padding(backbone: UNetBackbone) -> None:
    """A prompt has one end-of-text and then "!" (id 0); its length is the row of the end-of-text."""
    states = backbone.encode(["a photo of a jetliner", "", "tom cruise"])
    encoder: Any = backbone.text
    ids = padded_ids(encoder.tokenizer, ["a photo of a jetliner", "", "tom cruise"], encoder.length)
    end = backbone.text.tokenizer.eos_token_id  # type: ignore[union-attr]
    assert (ids == end).sum(dim=1).tolist() == [1, 1, 1]
    for row, length in zip(ids, states.length.tolist(), strict=True):
        assert row[length] == end and not row[length + 1 :].any()
    named = backbone.encode([NamedPrompt.of("a photo of a {}", "jetliner")])
    assert named.first.item() == 5 and named.last.item() == states.length[0].item() - 1 > 5


def test_a_full_prompt_ends_in_the_end_of_text(backbone: UNetBackbone) -> None:
    assert backbone.encode(["a " * 90]).length.tolist() == [76]


def test_an_edit_reaches_every_layer_and_the_images(tiny_sd21: Path) -> None:
    backbone = UNetBackbone("sd21", tiny_sd21, SAMPLER)
    images = backbone.generate(TEXTS, SEEDS)
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    backbone.apply(Edit(map=torch.eye(32, dtype=torch.float64) + 0.3 * noise))
    assert len(backbone.erased_state()) == len(backbone.text_projections()) == 32  # as in the real one
    assert (backbone.generate(TEXTS, SEEDS).int() - images.int()).abs().max() > 2
    with backbone.original():
        assert torch.equal(backbone.generate(TEXTS, SEEDS), images)
