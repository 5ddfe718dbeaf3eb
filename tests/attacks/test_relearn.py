"""Relearning: against slow references, with every kind of erased weights, and without a trace in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from realera.attack_contract import Attempt, MeasuresReturn
from realera.attacks import relearn
from realera.attacks.relearn import Relearning
from realera.contracts import Concept, Edit, LoraSpec, NamedPrompt, Prompt, UserError
from realera.evaluation.attacked import returned

CAT = Concept("cat", "field")
NAMES = [NamedPrompt.of("a photo of the {}", "cat"), NamedPrompt.of("a big drawing of {}", "cat")]


@dataclass
class FakeCase:
    """`attack_contract.Case` that notes the noise which the model predicts while a prompt is drawn."""

    backbone: Any
    searched: dict[str, Tensor] = field(default_factory=dict)
    concept: Concept = CAT
    names: Sequence[NamedPrompt] = tuple(NAMES)
    asked: list[Any] = field(default_factory=list)
    drawn: list[tuple[str, int, Tensor]] = field(default_factory=list)
    acted: int = 0

    def __post_init__(self) -> None:
        self.prompt = Prompt("erase-0", "a photo of the cat", "cat", "erase", 0)
        self.generator = Generator().manual_seed(0)

    def latents(self, count: int, chunk: int = 8, texts: Sequence[str] | None = None) -> Tensor:
        self.asked.append(texts)
        return torch.randn(count, 4, 8, 8, generator=Generator().manual_seed(5))

    @contextmanager
    def acting(self, texts: Sequence[str], states: Any = None) -> Any:
        self.acted += 1
        yield

    def draw_all(self, cases: Sequence[FakeCase], attempts: Sequence[Attempt], step: int = 0) -> list[bool]:
        for case, attempt in zip(cases, attempts, strict=True):
            case.drawn.append((str(attempt.text), step, noise_of(self.backbone)))
        return [True] * len(cases)


def noise_of(backbone: Any) -> Tensor:
    with torch.no_grad():
        z_t = torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(7))
        found: Tensor = backbone.predict_noise(z_t, torch.tensor([300]), backbone.encode(["a photo of the cat"]).states)
    return found


def with_edit(backbone: Any) -> Any:
    noise = torch.randn(32, 32, generator=Generator().manual_seed(1), dtype=torch.float64)
    backbone.apply(Edit(map=torch.eye(32, dtype=torch.float64) + 0.3 * noise))
    return backbone


def with_adapter(backbone: Any) -> Any:
    for value in with_edit(backbone).add_adapter(LoraSpec(rank=2), Generator().manual_seed(2)):
        nn.init.normal_(value.data, std=0.2, generator=Generator().manual_seed(3))
        value.requires_grad_(False)
    return backbone


KINDS = [with_edit, with_adapter]


def state_of(backbone: Any) -> dict[str, Any]:
    named = backbone.unet.named_parameters()
    return {name: (value.detach().clone(), value.requires_grad, value.grad) for name, value in named}


@pytest.mark.quick(1)
@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(new_backbone: Callable[..., Any], kind: Any, weights: Any) -> None:
    backbone = kind(new_backbone())
    before, saved, noise = state_of(backbone), backbone.erased_state(), noise_of(backbone)
    attack = Relearning(weights=weights, steps=[1, 3], count=3, batch=2, lr=1e-2)
    case: Any = FakeCase(backbone)
    case.searched = attack.search(case)
    assert torch.equal(noise_of(backbone), noise) and case.acted == 3
    attack(case)
    (_, first, one), (_, last, two) = case.drawn
    assert (first, last) == (1, 3)
    assert not torch.allclose(one, noise, atol=1e-4) and not torch.allclose(two, one, atol=1e-4)
    assert torch.equal(noise_of(backbone), noise)
    for name, (value, flag, gradient) in state_of(backbone).items():
        assert torch.equal(value, before[name][0]) and flag == before[name][1] and gradient is None
    assert backbone.erased_state().keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in backbone.erased_state().items())
    assert not any(module._forward_hooks for module in backbone.unet.modules())
    with backbone.original():
        assert torch.equal(noise_of(backbone), noise_of(new_backbone()))


def test_a_failure_leaves_the_model_as_it_was(new_backbone: Callable[..., Any]) -> None:
    backbone = with_edit(new_backbone())
    noise = noise_of(backbone)
    both: list[Any] = ["lora", "full"]
    for weights in both:
        case: Any = FakeCase(backbone)
        case.latents = lambda *given: torch.full((2, 4, 8, 8), torch.nan)
        with pytest.raises(UserError, match=r"attack\.lr"):
            Relearning(weights=weights, steps=[1], count=2).search(case)
        assert torch.equal(noise_of(backbone), noise)


def losses_slowly(unet: nn.Module, backbone: Any, generator: Generator, bank: Tensor) -> Tensor:
    """The loss of a step with two images, the U-Net called directly."""
    chosen = torch.randint(3, (2,), generator=generator)
    timesteps = backbone.draw_timesteps(2, generator)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    total = torch.zeros(())
    for image, t, one in zip(chosen.tolist(), timesteps, noise):
        states = backbone.encode([NAMES[image % 2].text]).states
        z_t = backbone.noisy_latents(bank[image][None], one[None], t[None])
        total = total + (unet(z_t, t, encoder_hidden_states=states).sample - one).square().mean() / 2
    return total


def test_full_fine_tuning(new_backbone: Callable[..., Any]) -> None:
    """Against AdamW on a copy of the U-Net."""
    backbone = with_edit(new_backbone())
    unet = copy.deepcopy(backbone.unet).requires_grad_(True)
    attack = Relearning(weights="full", steps=[2], count=3, batch=2, lr=1e-3)
    case: Any = FakeCase(backbone)
    found = attack.search(case)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-2)
    generator, bank = Generator().manual_seed(0), case.latents(3)
    for _ in range(2):
        optimizer.zero_grad()
        losses_slowly(unet, backbone, generator, bank).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    named = dict(unet.named_parameters())
    assert found.keys() == {f"2/{name}" for name in named}
    kept = dict(backbone.unet.named_parameters())
    for key, value in found.items():
        name = key.removeprefix("2/")
        # Adam's first step of a weight without gradient is a sign of rounding errors.
        assert float(((value - named[name]).abs() < 2e-5).float().mean()) > 0.98, name
    assert max(float((found[f"2/{name}"] - kept[name]).abs().max()) for name in named) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_of_relearning(new_backbone: Callable[..., Any], kind: Any) -> None:
    """Its first gradient against that of W + B A, written into the weights of a copy."""
    backbone = kind(new_backbone())
    attack = Relearning(steps=[1], count=3, batch=2, lr=1e-2, targets=["attn2.to_k", "to_out.0"], rank=3)
    case: Any = FakeCase(backbone)
    found = attack.search(case)
    ups = [key for key in found if key.endswith(".up")]
    layers = {name for name, _ in backbone.unet.named_modules() if name.endswith(("attn2.to_k", "to_out.0"))}
    assert {key.removeprefix("1/").removesuffix(".up") for key in ups} == layers and len(layers) == 21
    generator = Generator().manual_seed(0)
    downs = relearn.new_adapters(backbone, attack.targets, 3, generator)  # the same random numbers
    unet, bank = copy.deepcopy(backbone.unet), case.latents(3)
    for module in unet.modules():
        module.requires_grad_(True)
    losses_slowly(unet, backbone, generator, bank).backward()
    for key in ups[:6]:
        name = key.removeprefix("1/").removesuffix(".up")
        layer = unet.get_submodule(name)
        gradient = getattr(layer, "base_layer", layer).weight.grad
        by_up = gradient @ downs[f"{name}.down"].T  # of W + B A by B
        # the first step of AdamW is lr x sign, from B = 0
        large = by_up.abs() > 1e-5
        assert large.any() and torch.equal(found[key][large].sign(), -by_up[large].sign())
        assert torch.allclose(found[key][large].abs(), torch.full_like(found[key][large], 1e-2), rtol=1e-2)


def test_the_adapter_in_use_equals_merged_weights(new_backbone: Callable[..., Any]) -> None:
    backbone = with_edit(new_backbone())
    adapters = relearn.new_adapters(backbone, ["to_v"], 2, Generator().manual_seed(0))
    for key in adapters:
        if key.endswith(".up"):
            nn.init.normal_(adapters[key], generator=Generator().manual_seed(1))
    with relearn.adapted(backbone, adapters):
        found = noise_of(backbone)
    for key in adapters:
        if key.endswith(".up"):
            name = key.removesuffix(".up")
            backbone.unet.get_submodule(name).weight.data += adapters[key] @ adapters[f"{name}.down"]
    assert torch.allclose(found, noise_of(backbone), atol=1e-5)


@pytest.mark.slow
def test_it_can_learn_the_images(new_backbone: Callable[..., Any]) -> None:
    backbone = with_edit(new_backbone())
    attack = Relearning(steps=[60], count=1, batch=8, lr=1e-2)
    case: Any = FakeCase(backbone)
    found = attack.search(case)
    bank = case.latents(1).repeat(3, 1, 1, 1)

    def loss() -> float:
        generator = Generator().manual_seed(9)
        with torch.no_grad():
            return sum(float(losses_slowly(backbone.unet, backbone, generator, bank)) for _ in range(8)) / 8

    before = loss()
    with relearn.adapted(backbone, {key.removeprefix("60/"): value for key, value in found.items()}):
        assert loss() < 0.97 * before


def test_harmless_images_are_not_of_the_concept(new_backbone: Callable[..., Any]) -> None:
    attack = Relearning("harmless", steps=[1], count=2, things=["dog", "Cat", "a black cat", "ship"])
    case: Any = FakeCase(new_backbone())
    attack.search(case)
    assert case.asked == [["a photo of a dog", "a photo of a ship"]]
    with pytest.raises(UserError, match=r"attack\.things"):
        Relearning("harmless", things=["cat"]).search(FakeCase(new_backbone()))  # type: ignore[arg-type]
    Relearning(steps=[1], count=2).search(case)
    assert case.asked[1] is None


def test_bad_settings(new_backbone: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="must rise"):
        Relearning(steps=[50, 10])
    with pytest.raises(UserError, match="to_k"):
        Relearning(targets=["to_x"], steps=[1]).search(FakeCase(new_backbone()))  # type: ignore[arg-type]
    for dtype, weights in (("float16", "lora"), ("float16", "full"), ("bfloat16", "full")):
        with pytest.raises(UserError, match=r"backbone\.dtype"):
            case: Any = FakeCase(new_backbone(dtype=dtype))
            Relearning(weights=weights, steps=[1]).search(case)


def test_half_precision_takes_an_adapter(new_backbone: Callable[..., Any]) -> None:
    case: Any = FakeCase(new_backbone(dtype="bfloat16"))
    attack = Relearning(steps=[2], count=2, lr=1e-2)
    case.searched = attack.search(case)
    assert {value.dtype for value in case.searched.values()} == {torch.float32}
    attack(case)
    assert case.drawn[0][2].isfinite().all()


def line(original: bool, plain: bool, *drawn: bool) -> dict[str, Any]:
    steps = (10, 50, 100)
    return {"original": original, "plain": plain, "drawn": [list(pair) for pair in zip(steps, drawn)]}


def test_how_the_concept_returns() -> None:
    assert isinstance(Relearning(), MeasuresReturn)
    lines = [
        line(True, False, False, True, True),
        line(True, False, False, False, True),
        line(True, False, True, False, True),
        line(False, False, False, False, True),
    ]
    found = returned(lines)
    assert found["curve"] == [[0, 0.0], [10, 25.0], [50, 25.0], [100, 100.0]]
    assert found["half"] == pytest.approx(50 + 50 * (37.5 - 25) / 75)  # half of 75%
    assert returned([line(True, True, True, True, True)])["half"] == 0
    assert returned([line(True, False, False, False, False)])["half"] is None
    assert returned([line(False, False, True, True, True)])["half"] is None
