"""Erasers behind the cross-attention: what they add, the teacher without them, saving and refusing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from realera.backbones import erasers
from realera.contracts import EraserSpec, LoraSpec, UserError

Z, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([100, 700])


def noise(backbone: Any, text: str = "a cat") -> Tensor:
    found: Tensor = backbone.predict_noise(Z, T, backbone.encode([text]).states.expand(2, -1, -1))
    return found


@pytest.fixture
def erased(new_backbone: Callable[..., Any]) -> Any:
    """A backbone with erasers that change something."""
    backbone = new_backbone()
    weights = backbone.add_adapter(EraserSpec(6), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return backbone


def test_at_first_nothing_changes_and_the_seed_decides(new_backbone: Callable[..., Any]) -> None:
    fresh, one, two = new_backbone(), new_backbone(), new_backbone()
    weights = [b.add_adapter(EraserSpec(6), torch.Generator().manual_seed(4)) for b in (one, two)]
    assert len(weights[0]) == 4 * len(erasers.found(one.unet)) == 4 * 7
    assert all(torch.equal(a, b) for a, b in zip(*weights)) and all(w.requires_grad for w in weights[0])
    assert torch.equal(noise(one).detach(), noise(fresh))


def test_the_formula(erased: Any, new_backbone: Callable[..., Any]) -> None:
    """o + W2 gelu(W1 o + b1) + b2 behind each attention, by another U-Net whose modules are replaced."""
    own = {name: [p.detach().clone() for p in one.parameters()] for name, one in erasers.found(erased.unet).items()}
    slow = new_backbone()

    def behind(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Any:
        def hook(module: Any, inputs: Any, o: Tensor) -> Tensor:
            hidden = o @ w1.T + b1
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            return o + hidden @ w2.T + b2

        return hook

    for name, weights in own.items():
        slow.unet.get_submodule(name).register_forward_hook(behind(*weights))
    assert torch.allclose(noise(erased).detach(), noise(slow), atol=1e-5)
    assert not torch.allclose(noise(slow), noise(new_backbone()), atol=1e-3)


def test_the_teacher_has_none_and_a_copy_has_its_own(erased: Any, new_backbone: Callable[..., Any]) -> None:
    before = noise(new_backbone())
    twin = copy.deepcopy(erased)
    with erased.original():
        assert torch.equal(noise(erased), before)
        assert not torch.equal(noise(twin).detach(), before)
    after = noise(erased).detach()
    assert torch.equal(noise(twin).detach(), after)
    twin.remove_adapter()
    assert torch.equal(noise(twin), before) and torch.equal(noise(erased).detach(), after)
    assert set(dict(twin.unet.named_parameters())) == set(dict(new_backbone().unet.named_parameters()))


def test_their_outputs_have_gradients(erased: Any) -> None:
    with erased.eraser_outputs() as added:
        noise(erased)
    assert set(added) == set(erasers.found(erased.unet))
    assert {found.shape[1] for found in added.values()} == {64, 16} and all(f.shape[0] == 2 for f in added.values())
    first = next(iter(added))
    (gradient,) = torch.autograd.grad(added[first].square().sum(), [erasers.found(erased.unet)[first].down.weight])
    assert gradient.any()
    with erased.eraser_outputs() as none:
        pass
    assert none == {}


def test_what_is_saved_is_loaded(erased: Any, new_backbone: Callable[..., Any]) -> None:
    state, other = erased.erased_state(), new_backbone()
    assert len(state) == 28 and all(key.startswith("eraser.") for key in state)
    other.load_erased(state)
    assert torch.equal(noise(other), noise(erased).detach())
    assert not any(weight.requires_grad for weight in other.unet.parameters())
    other.merge_adapter()  # they stay
    assert torch.equal(noise(other), noise(erased).detach())
    images = other.generate(["a cat"], [1]), new_backbone().generate(["a cat"], [1])
    assert not torch.equal(*images)
    other.load_erased({})
    assert torch.equal(noise(other), noise(new_backbone()))


def test_states_that_do_not_fit(erased: Any, new_backbone: Callable[..., Any]) -> None:
    state, other = erased.erased_state(), new_backbone()
    key = next(iter(state))
    lacking = {name: value for name, value in state.items() if name != key}
    for bad, said in ((lacking, "other erasers"), ({**state, key: torch.zeros(6, 3)}, "The eraser .* is \\(6, 3\\)")):
        with pytest.raises(UserError, match=said):
            other.load_erased(bad)
        assert not erasers.found(other.unet) and torch.equal(noise(other), noise(new_backbone()))


def test_one_adapter_at_a_time(erased: Any) -> None:
    for spec in (EraserSpec(2), LoraSpec()):
        with pytest.raises(RuntimeError, match="an adapter is in place"):
            erased.add_adapter(spec, torch.Generator())


def test_half_precision_has_erasers_in_whole_precision(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone(dtype="bfloat16")
    weights = backbone.add_adapter(EraserSpec(2), torch.Generator().manual_seed(0))
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert noise(backbone).isfinite().all()


@pytest.mark.slow
def test_compiled_code_sees_them(new_backbone: Callable[..., Any]) -> None:
    """A compiled graph would not notice that they are switched off: with hooks the plain U-Net runs."""
    backbone = new_backbone(compile="eager")
    before = noise(backbone)
    weights = backbone.add_adapter(EraserSpec(2), torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights[-1].add_(1)
    assert not torch.allclose(noise(backbone).detach(), before)
    with backbone.original():
        assert torch.allclose(noise(backbone), before, atol=1e-5)
