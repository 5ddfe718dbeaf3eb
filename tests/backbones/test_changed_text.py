"""A text encoder as the trained network: gradients, teacher, caches, saving, adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from realera.backbones.unet import UNetBackbone
from realera.contracts import LoraSpec, NamedPrompt, Pair, Sampler, UserError

WHOLE = ("encoder", "final_layer_norm")


def states(backbone: Any, text: str = "a photo of a cat") -> Tensor:
    found: Tensor = backbone.encode([text]).states
    return found


def trained(backbone: Any, targets: tuple[str, ...] = WHOLE, rate: float = 0.1) -> list[Tensor]:
    """One step on the text encoder."""
    backbone.choose("text_encoder")
    weights = backbone.unfreeze(targets)
    gradients = torch.autograd.grad(states(backbone).square().sum(), weights, allow_unused=True)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients):
            if gradient is not None:
                weight -= rate * gradient
    return list(weights)


@pytest.fixture
def xl(tiny_sdxl: Path) -> UNetBackbone:
    return UNetBackbone("sdxl", tiny_sdxl, Sampler("ddim", 2, 5.0, 64, 64))


def test_it_is_trained_and_the_teacher_reads_as_loaded(new_backbone: Callable[..., Any]) -> None:
    fresh, backbone = new_backbone(), new_backbone()
    before = states(fresh)
    own, unet = backbone.text_fingerprint, {n: w.clone() for n, w in backbone.unet.named_parameters()}
    assert not states(backbone).requires_grad
    weights = trained(backbone)
    assert {id(w) for w in weights} <= {id(w) for w in backbone.trained.parameters()}
    now = states(backbone)
    assert now.requires_grad and not torch.allclose(now, before, atol=1e-3)
    with backbone.original():
        assert torch.equal(states(backbone), before) and backbone.text_fingerprint == own
        assert torch.equal(backbone.generate(["a cat"], [1]), fresh.generate(["a cat"], [1]))
    with backbone.original(edited=True):
        assert torch.equal(states(backbone), now.detach())
    assert backbone.text_fingerprint not in (own, "") and backbone.fingerprint == fresh.fingerprint
    assert all(torch.equal(value, unet[name]) for name, value in backbone.unet.named_parameters())
    assert not any(value.requires_grad for value in backbone.unet.parameters())


def test_cached_states_are_never_of_other_weights(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    first, image = states(backbone), backbone.generate(["a cat"], [1])
    trained(backbone)
    second = states(backbone).detach()
    trained(backbone)
    third = states(backbone).detach()
    state = backbone.erased_state()
    assert not torch.equal(first, second) and not torch.equal(second, third)
    backbone.load_erased(state)
    assert torch.equal(states(backbone), third) and not states(backbone).requires_grad
    with backbone.original():
        assert torch.equal(states(backbone), first)
    assert torch.equal(states(backbone), third)
    drawn = backbone.generate(["a cat"], [1])
    with backbone.original():  # the empty prompt is read anew too
        assert torch.equal(backbone.generate(["a cat"], [1]), image)
    assert not torch.equal(drawn, image) and torch.equal(backbone.generate(["a cat"], [1]), drawn)
    backbone.load_erased({})
    assert torch.equal(states(backbone), first) and torch.equal(backbone.generate(["a cat"], [1]), image)


def test_vectors_and_weights_have_gradients_together(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    backbone.choose("text_encoder")
    weights = backbone.unfreeze(["layers.0.mlp"])
    vectors = backbone.token_vectors("cat").clone().requires_grad_(True)
    made = backbone.encode([NamedPrompt.of("a {}", "cat")], vectors=vectors).states
    assert torch.allclose(made, states(backbone, "a cat"), atol=1e-5)
    gradients = torch.autograd.grad(made.square().sum(), [vectors, *weights])
    assert all(gradient.any() for gradient in gradients)


def test_what_is_saved_is_loaded(new_backbone: Callable[..., Any]) -> None:
    backbone, other = new_backbone(), new_backbone()
    trained(backbone)
    state = backbone.erased_state()
    assert state and all(key.startswith("edit.text_encoder.") and "text_model" not in key for key in state)
    assert not any("embedding" in key for key in state)
    other.load_erased(state)
    assert torch.equal(states(other), states(backbone).detach())
    assert other.text_fingerprint == backbone.text_fingerprint != new_backbone().text_fingerprint
    bad = {**state, next(iter(state)): torch.zeros(3)}
    with pytest.raises(UserError, match="has shape"):
        other.load_erased(bad)
    assert torch.equal(states(other), states(new_backbone()))


def test_a_lora_of_the_text_encoder(new_backbone: Callable[..., Any]) -> None:
    backbone, other = new_backbone(), new_backbone()
    before = states(backbone)
    backbone.choose("text_encoder")
    _, up, *_ = backbone.add_adapter(
        LoraSpec(2, 2.0, ("self_attn.q_proj", "mlp.fc1")), torch.Generator().manual_seed(0)
    )
    assert torch.equal(states(backbone).detach(), before)
    with torch.no_grad():
        up.normal_(generator=torch.Generator().manual_seed(1))
    adapted = states(backbone).detach()
    assert not torch.allclose(adapted, before)
    for edited in (False, True):  # with edited=True too: its base weights are as loaded
        with backbone.original(edited=edited):
            assert torch.equal(states(backbone).detach(), before)
    state = backbone.erased_state()
    assert state and all(key.startswith("lora.text_encoder.encoder.layers.") for key in state)
    other.load_erased(state)
    assert torch.equal(states(other), adapted)
    other.merge_adapter()
    assert torch.allclose(states(other), adapted, atol=1e-5)
    assert all(key.startswith("edit.text_encoder.") for key in other.erased_state())
    other.load_erased({})
    assert torch.equal(states(other), before)


def test_both_encoders_of_xl(xl: UNetBackbone, tiny_sdxl: Path) -> None:
    before = xl.encode(["a cat"])
    xl.choose("text_encoder")
    weights = xl.unfreeze(["encoder", "text_projection"])
    read = xl.encode(["a cat"])
    assert read.pooled is not None
    gradients = torch.autograd.grad(read.states.square().sum() + read.pooled.square().sum(), weights, allow_unused=True)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients):
            weight -= 0.1 * (torch.zeros(()) if gradient is None else gradient)
    state = xl.erased_state()
    assert {key.split(".")[1] for key in state} == {"text_encoder", "text_encoder_2"}
    assert "edit.text_encoder_2.text_projection.weight" in state
    after = xl.encode(["a cat"])
    other = UNetBackbone("sdxl", tiny_sdxl, Sampler("ddim", 2, 5.0, 64, 64))
    other.load_erased(state)
    loaded = other.encode(["a cat"])
    assert before.pooled is not None and after.pooled is not None and loaded.pooled is not None
    for one, two in ((loaded.states, after.states), (loaded.pooled, after.pooled)):  # some CPUs round them differently
        assert torch.allclose(one, two.detach(), rtol=1e-5, atol=1e-6 * float(two.detach().abs().max()))
    assert not torch.allclose(loaded.pooled, before.pooled)


def test_targets_that_match_nothing(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    backbone.choose("text_encoder")
    with pytest.raises(UserError, match=r"'attn2' matched 0 weights .* embeddings, encoder, final_layer_norm"):
        backbone.unfreeze(["attn2"])


def test_training_prompts_are_the_original_models(
    new_backbone: Callable[..., Any], new_pairs: Callable[..., list[Pair]]
) -> None:
    """A method reads them at any time."""
    from realera.settings import composition
    from realera.training.pairs import encoded_pairs

    backbone = new_backbone()
    task = composition.build_task(composition.settings_of("train", ["concept=cat", "anchor=dog", "backbone=mini"]))
    (pair,) = encoded_pairs(backbone, task)
    before = encoded_pairs(new_backbone(), task)[0].target.states
    trained(backbone)
    assert torch.equal(pair.target.states, before) and not pair.target.states.requires_grad
