"""The weights that ship with the package are complete, load in diffusers, and are as good as the card says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

from realera.contracts import Prompt, Sampler
from realera.miniature.check import BARS, FLOOR, flatten, generate_and_judge, groups, verdict
from realera.paths import CONF_DIR, MINIATURE


@pytest.fixture(scope="module")
def measured() -> dict:
    return json.loads((MINIATURE / "check.json").read_text(encoding="utf-8"))


def test_the_card_has_every_number(measured):
    card = (MINIATURE / "README.md").read_text(encoding="utf-8")
    for name, value in flatten(measured).items():
        assert f"| {name} | {value} |" in card
    for credit in ("Noto", "Fluent", "Twemoji", "CC BY 4.0", "Apache-2.0", "MIT", "MiniLM", "WordNet"):
        assert credit in card


def test_the_thresholds_are_met(measured):
    assert measured["images"] >= 200
    missed = [name for name, value in flatten(measured).items() if verdict(name, value) == "MISSED"]
    assert not missed
    assert set(BARS) <= set(flatten(measured)) and FLOOR == 60


def test_the_size_of_the_weights():
    size = sum(file.stat().st_size for file in MINIATURE.rglob("*") if file.is_file())
    assert size < 40e6


def test_the_yaml_states_the_row_norm_that_was_measured(measured):
    stated = yaml.safe_load((CONF_DIR / "backbone" / "mini.yaml").read_text(encoding="utf-8"))["text"]["row_norm"]
    assert stated == pytest.approx(measured["row_norm"], rel=0.02)


def test_images_show_their_prompt():
    prompts = [
        Prompt(f"{name}-{seed}", f"a photo of the {name}", name, "keep", seed)
        for name in ("airplane", "cat", "ship", "frog")
        for seed in range(500, 504)
    ]
    _, judged = generate_and_judge(MINIATURE, prompts)
    right = [label == prompt.concept for label, prompt in zip(judged, prompts)]
    assert np.mean(right) >= 0.85


@pytest.mark.slow
def test_the_diffusers_pipeline_generates_the_same_image():
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from realera.backbones.unet import UNetBackbone

    pipeline = StableDiffusionPipeline.from_pretrained(MINIATURE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        "a photo of the cat",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=20,
        guidance_scale=5.0,
        height=32,
        width=32,
        output_type="np",
    ).images[0]
    backbone = UNetBackbone(name="mini", pretrained=None, sampler=Sampler("dpm++", 20, 5.0, 32, 32))
    ours = backbone.generate(["a photo of the cat"], [3])[0].numpy() / 255
    assert np.abs(theirs - ours).max() < 0.02


def test_every_group_of_the_check_has_enough_images_and_its_own_prompts():
    from realera.miniature.art import load_world

    asked = groups(load_world(), 200, seed=0)
    assert set(asked) >= {"object", "synonym", "associated", "celebrity", "style", "unsafe", "everyday", "unseen"}
    for prompts in asked.values():
        assert len(prompts) >= 200
        assert len({(p.text, p.seed) for p in prompts}) == len(prompts)


def test_the_image_encoder_is_trained_too():
    """Encoding and decoding an image gives nearly the same image, within the card's threshold of 27 dB."""
    from realera.backbones.unet import UNetBackbone

    backbone = UNetBackbone(name="mini", pretrained=None, sampler=Sampler("dpm++", 10, 5.0, 32, 32))
    latents = backbone.sample(backbone.encode(["a photo of the cat", "a photo of the ship"]), [0, 1])
    images = backbone.decode(latents)
    back = backbone.decode(backbone.encode_images(images.permute(0, 3, 1, 2) / 127.5 - 1))
    error = ((images.float() - back.float()) / 255).square().mean(dim=(1, 2, 3))
    assert (error < 10**-2.7).all()
