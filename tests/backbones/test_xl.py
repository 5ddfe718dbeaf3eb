"""Stable Diffusion XL: two text encoders, a pooled state and image sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from torch import Tensor

import folders
from realera.backbones import sampling
from realera.backbones.text import PairedTextEncoder, padded_ids
from realera.backbones.unet import UNetBackbone
from realera.closed_form import NormalEquations
from realera.contracts import Backbone, Edit, LoraSpec, NamedPrompt, Sampler, UserError

SAMPLER = Sampler("ddim", steps=3, guidance_scale=5.0, height=64, width=64)
TEXTS, SEEDS = ["a photo of a cat", "an airplane in the sky"], [3, 8]


@pytest.fixture
def backbone(tiny_sdxl: Path) -> UNetBackbone:
    return UNetBackbone("sdxl", tiny_sdxl, SAMPLER)


@pytest.fixture(scope="module")
def shared(tiny_sdxl: Path) -> UNetBackbone:
    """For tests that change nothing."""
    return UNetBackbone("sdxl", tiny_sdxl, SAMPLER)


def pipeline_of(folder: Path, scheduler: str = "ddim") -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    kind = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[scheduler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    return pipeline


def pipeline_images(pipeline: StableDiffusionXLPipeline, sampler: Sampler = SAMPLER) -> Tensor:
    shape = (4, sampler.height // 8, sampler.width // 8)
    found = pipeline(
        TEXTS,
        latents=sampling.start_noise(SEEDS, shape),
        output_type="np",
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        height=sampler.height,
        width=sampler.width,
    )
    return torch.from_numpy(found.images)


def pixels(images: Tensor) -> Tensor:
    return images / 255


# --- as diffusers has it ---------------------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("change", [{}, {"scheduler": "dpm++"}, {"height": 48, "width": 80}, {"guidance_scale": 1.0}])
def test_images_are_those_of_the_diffusers_pipeline(
    tiny_sdxl: Path, shared: UNetBackbone, change: dict[str, Any]
) -> None:
    sampler = replace(SAMPLER, **change)
    expected = pipeline_images(pipeline_of(tiny_sdxl, sampler.scheduler), sampler)
    images = shared.generate(TEXTS, SEEDS, sampler)
    assert images.shape == (2, sampler.height, sampler.width, 3)
    assert (pixels(images) - expected).abs().max() < 1.01 / 255
    assert images.float().std() > 5  # an image, not one colour


def test_ddim_takes_the_steps_of_its_own_euler_scheduler(tiny_sdxl: Path, shared: UNetBackbone) -> None:
    """Up to a scale of the latents the two are the same solver; they end at different, very low noise levels."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    settings = {"num_inference_steps": 8, "guidance_scale": 5.0, "height": 64, "width": 64}
    start = sampling.start_noise(SEEDS, (4, 8, 8))
    expected = pipeline(TEXTS, latents=start, output_type="latent", **settings).images
    found = shared.sample(shared.encode(TEXTS), SEEDS, replace(SAMPLER, steps=8))
    assert (found - expected).abs().max() < 0.003 * expected.abs().max()


def test_text_is_that_of_the_diffusers_pipeline(tiny_sdxl: Path, shared: UNetBackbone) -> None:
    with torch.no_grad():
        states, _, pooled, _ = pipeline_of(tiny_sdxl).encode_prompt(TEXTS)
    ours = shared.encode(
        [NamedPrompt.of(text.replace(name, "{}"), name) for text, name in zip(TEXTS, ("cat", "airplane"))]
    )
    assert ours.states.shape == (2, 77, 80) and ours.pooled is not None and ours.pooled.shape == (2, 48)
    torch.testing.assert_close(ours.states, states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=1e-5)
    assert (ours.first.tolist(), ours.last.tolist(), ours.length.tolist()) == ([5, 2], [5, 2], [6, 6])
    short = shared.encode(TEXTS, to_end=True)
    assert short.pooled is not None and short.states.shape == (2, 7, 80)
    torch.testing.assert_close(short.states, states[:, :7], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(short.pooled, pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize("zeros", [True, False])
def test_what_guidance_leads_away_from(tiny_sdxl: Path, tmp_path: Path, zeros: bool) -> None:
    folder = folders.copied(tiny_sdxl, tmp_path / "xl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    backbone = UNetBackbone("sdxl", folder, SAMPLER)
    away = backbone._no_prompt()
    assert away.pooled is not None
    assert bool(away.states.any()) == bool(away.pooled.any()) == (not zeros)
    assert backbone.encode([""]).states.any()  # a prompt that is empty is still a prompt
    expected = pipeline_images(pipeline_of(folder))
    assert (pixels(backbone.generate(TEXTS, SEEDS)) - expected).abs().max() < 1.01 / 255
    assert (backbone.fingerprint == UNetBackbone("sdxl", tiny_sdxl, SAMPLER).fingerprint) == zeros


def test_sizes_are_in_pixels(shared: UNetBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    embed = shared.unet.get_aug_embed  # type: ignore[operator]

    def spy(**given: Any) -> Tensor:
        seen.append(given["added_cond_kwargs"]["time_ids"])
        return embed(**given)

    monkeypatch.setattr(shared.unet, "get_aug_embed", spy)
    states = shared.encode(TEXTS)
    shared.sample(states, SEEDS, replace(SAMPLER, height=40, width=72, steps=1))
    shared.predict_noise(torch.zeros(2, 4, 3, 5), torch.tensor([0, 5]), states.states, states.pooled)
    assert seen[0].tolist() == [[40, 72, 0, 0, 40, 72]] * 4  # with guidance there are two rows for each prompt
    assert seen[1].tolist() == [[24, 40, 0, 0, 24, 40]] * 2


def test_the_pooled_state_is_needed_and_counts(shared: UNetBackbone) -> None:
    states, x, t = shared.encode(TEXTS), torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    with pytest.raises(ValueError, match="takes the pooled text state"):
        shared.predict_noise(x, t, states.states)
    assert states.pooled is not None
    out = shared.predict_noise(x, t, states.states, states.pooled)
    assert (out - shared.predict_noise(x, t, states.states, states.pooled.flip(0))).abs().max() > 1e-4


# --- rows ------------------------------------------------------------------------------------------------------------


def test_each_tokenizer_pads_its_own_way_and_the_rows_agree(shared: UNetBackbone) -> None:
    assert isinstance(shared.text, PairedTextEncoder)
    first, second = shared.text.first, shared.text.second
    ids = [padded_ids(one.tokenizer, ["a cat"], one.length) for one in (first, second)]
    end = first.tokenizer.eos_token_id
    assert (ids[0][0, 3:] == end).all() and ids[1][0, 3] == end and not ids[1][0, 4:].any()  # "!" has the id 0
    assert torch.equal(ids[0][:, :4], ids[1][:, :4])
    states = shared.encode([NamedPrompt.of("a photo of {}", "tom cruise")])
    assert (states.first.item(), states.last.item(), states.length.item()) == (4, 5, 6)


def test_tokenizers_that_part_words_differently(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = folders.copied(tiny_sdxl, tmp_path / "xl")
    file = folder / "tokenizer_2" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:5]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="split the prompt 'a photo of a cat' differently"):
        UNetBackbone("sdxl", folder, SAMPLER).encode([NamedPrompt.of("a photo of a {}", "cat")])


def test_pooled_states_that_do_not_fit(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = folders.copied(tiny_sdxl, tmp_path / "xl")
    vocabulary = json.loads((folder / "tokenizer_2" / "tokenizer.json").read_text())["model"]["vocab"]
    folders.save_text(
        folder / "text_encoder_2", vocabulary, 48, layers=2, activation="gelu", projection=40, projected=True
    )
    with pytest.raises(UserError, match="pooled states of width 40 and its U-Net reads 48"):
        UNetBackbone("sdxl", folder, SAMPLER)


# --- an edit changes what it must ------------------------------------------------------------------------------------


def erasing(backbone: UNetBackbone, target: str, anchor: str) -> Edit:
    """The closed form that maps every row of the target's prompt to that of the anchor's."""
    read = backbone.encode([f"a photo of a {target}", f"a photo of a {anchor}"]).states.double()
    kept = backbone.encode(["a photo of a ship", "a red truck"]).states[:, 1:].flatten(0, 1)
    sums = NormalEquations(backbone.width).add_pairs(read[0, 5:], read[1, 5:]).add_preserved(kept)
    return Edit(map=sums.solve(1e-3)[0])


def outputs(backbone: UNetBackbone, text: str) -> dict[str, Tensor]:
    """The output of each cross-attention block for a prompt."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, given, out: found.__setitem__(name, out.detach())

    blocks = [(n, m) for n, m in backbone.unet.named_modules() if n.endswith("attn2")]
    hooks = [module.register_forward_hook(note(name)) for name, module in blocks]
    states = backbone.encode([text])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    backbone.predict_noise(latents, torch.tensor([400]), states.states, states.pooled)
    for hook in hooks:
        hook.remove()
    return found


def test_an_edit_reaches_every_layer_and_the_images(backbone: UNetBackbone) -> None:
    role: Backbone = backbone
    assert isinstance(role, Backbone) and backbone.width == 80
    before, images = outputs(backbone, "a photo of a cat"), backbone.generate(TEXTS, SEEDS)
    weights = {name: layer.weight.clone() for name, layer in backbone.text_projections().items()}
    # 2 + 2 blocks down with 2 and 3 layers each, 3 in the middle, 3 + 3 up with 3 and 2; keys and values.
    assert len(weights) == 2 * (2 * 2 + 2 * 3 + 3 + 3 * 3 + 3 * 2) == 2 * len(before)
    assert all(weight.shape[1] == 80 for weight in weights.values())
    backbone.apply(erasing(backbone, "cat", "field"))
    for name, layer in backbone.text_projections().items():
        moved = (layer.weight - weights[name]).norm(dim=0) / weights[name].norm(dim=0)
        assert moved[:32].max() > 0.05 and moved[32:].max() > 0.05, name  # in both encoders' columns
    after = outputs(backbone, "a photo of a cat")
    assert all((after[name] - before[name]).norm() > 0.02 * before[name].norm() for name in before)
    assert len(backbone.erased_state()) == len(weights)
    assert (backbone.generate(TEXTS, SEEDS)[0].int() - images[0].int()).abs().max() > 2
    with backbone.original():
        assert torch.equal(backbone.generate(TEXTS, SEEDS), images)


def test_the_edit_maps_the_concept_and_preserves_others(backbone: UNetBackbone) -> None:
    """Keys and values of the concept's rows become those of the anchor; those of preserved prompts do not change."""
    read = backbone.encode(["a photo of a cat", "a photo of a field", "a photo of a ship"]).states
    before = {name: layer.weight.clone() for name, layer in backbone.text_projections().items()}
    backbone.apply(erasing(backbone, "cat", "field"))
    for name, layer in backbone.text_projections().items():
        gap = (read[0, 5:] - read[1, 5:]) @ before[name].T
        left = read[0, 5:] @ layer.weight.T - read[1, 5:] @ before[name].T
        assert left.norm() < 0.2 * gap.norm(), name
        kept = read[2, 1:] @ (layer.weight - before[name]).T
        assert kept.norm() < 0.05 * (read[2, 1:] @ before[name].T).norm(), name


def test_a_lora_on_cross_attention_trains(backbone: UNetBackbone) -> None:
    parameters = backbone.add_adapter(LoraSpec(rank=2), torch.Generator().manual_seed(0))
    assert len(parameters) == 2 * len(backbone.text_projections())
    assert all(p.shape == (2, 80) for p in parameters[::2])
    states, x, t = backbone.encode(TEXTS), torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    with backbone.original():
        target = backbone.predict_noise(x, t, states.states.flip(0), states.pooled)
    before = backbone.predict_noise(x, t, states.states, states.pooled)
    (before - target).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters[1::2])  # every B: A's gradient is 0 while B is
    torch.optim.SGD(parameters, lr=10.0).step()
    after = backbone.predict_noise(x, t, states.states, states.pooled)
    assert (after - target).square().mean() < (before - target).square().mean()
    assert (after - before).abs().max() > 1e-6


def test_a_lora_on_the_layer_that_reads_the_pooled_state(backbone: UNetBackbone) -> None:
    """The pooled state contains the concept too. An edit of cross-attention cannot change it; a LoRA can."""
    found = backbone.add_adapter(LoraSpec(targets=("add_embedding.linear_1",)), torch.Generator().manual_seed(0))
    assert [tuple(p.shape) for p in found] == [(1, 96), (32, 1)]


def test_parked_parts_come_back(backbone: UNetBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    assert isinstance(backbone.text, PairedTextEncoder)
    for name, module in (
        ("vae", backbone.vae),
        ("one", backbone.text.first.model),
        ("two", backbone.text.second.model),
    ):
        monkeypatch.setattr(module, "to", lambda device, name=name: asked.append(f"{name} {device}"))
    backbone.park()
    assert sorted(asked) == ["one cpu", "two cpu", "vae cpu"]
    del asked[:]
    backbone.encode(["a cat"])
    assert asked == ["one cpu", "two cpu"]  # the device that the U-Net is on
