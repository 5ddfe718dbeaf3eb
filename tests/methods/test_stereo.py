"""STEREO against slow, obvious loops: the search's two halves, and the loss of stage 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from options import built
from realera.contracts import Concept, NamedPrompt, Pair, TrainingBatch, UserError
from realera.methods.latents import AnchorBank
from realera.methods.rollout import Rollout
from realera.methods.stereo import RobustErasing, SearchedRollout, ThoroughSearch, erased_texts, token

NAME = "mona lisa"
LAYERS = ["attn2"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def student(new_backbone: Callable[..., Any]) -> Any:
    """A backbone whose trained weights differ from the original's."""
    backbone = new_backbone()
    with torch.no_grad():
        for weight in backbone.unfreeze(LAYERS):
            weight.add_(0.05 * torch.randn(weight.shape, generator=seeded(weight.numel())))
    return backbone


@pytest.fixture
def pair(new_backbone: Callable[..., Any], new_pairs: Callable[..., list[Pair]]) -> Pair:
    return new_pairs(new_backbone(), (NAME, "person"))[0]


def searching(**more: Any) -> ThoroughSearch:
    rollout = built(Rollout, steps=3, first_stop=1, timestep="list", batch=1)
    images = built(AnchorBank, of="target", images=4, chunk=4, batch=2)
    settings: dict[str, Any] = {"rounds": 2, "erase_steps": 2, "invert_steps": 2, "start": "cat", **more}
    found: ThoroughSearch = built(ThoroughSearch, images=images, rollout=rollout, **settings)
    return found


@pytest.mark.quick(1)
@pytest.mark.parametrize(("scale", "found"), [(2.0, 2), (1.0, 0), (3.5, 1)])
def test_the_loss_and_its_gradient(
    scale: float, found: int, student: Any, new_backbone: Callable[..., Any], pair: Pair
) -> None:
    teacher = new_backbone()
    vectors = [torch.randn(1, 32, generator=seeded(i)) for i in range(found)]
    texts = erased_texts(student, NAME, vectors)
    assert len(texts.states) == found + 1
    z_t, t = torch.randn(2, 4, 8, 8, generator=seeded(4)), torch.tensor([250, 600])
    shown, anchors = torch.tensor([0, found]), pair.target.states[[1, 0]]
    known = {"prompts": shown, "anchor_states": anchors, "erase_states": texts.states.expand(2, -1, -1, -1)}
    align = built(RobustErasing, parameters=LAYERS, scale=scale)
    align.prepare(student, [pair], Path(), 0)
    terms = align.loss(student, pair, None, TrainingBatch(z_t, t, 1, known), seeded())
    slow = torch.zeros(())
    for b in range(2):
        one = z_t[b : b + 1], t[b : b + 1]
        every = [teacher.encode([NAME]).states] + [
            teacher.encode([NamedPrompt.of("{}", NAME)], vectors=vector).states for vector in vectors
        ]
        with torch.no_grad():
            empty = teacher.predict_noise(*one, teacher.encode([""]).states)
            away = [teacher.predict_noise(*one, states) - empty for states in every]
            towards = teacher.predict_noise(*one, anchors[b : b + 1]) - empty
        # the official code: positive guidance counts scale - 1, negative guidance -scale - 1, each averaged
        goal = empty + (scale - 1) * towards + (-scale - 1) * sum(away) / len(away)
        slow = slow + ((student.predict_noise(*one, every[int(shown[b])]) - goal) ** 2).mean() / 2
    assert set(terms) == {"erase"} and torch.allclose(terms["erase"], slow, rtol=1e-4)
    weights = [weight for weight in student.unet.parameters() if weight.requires_grad]
    fast, plain = (torch.cat([g.flatten() for g in torch.autograd.grad(x, weights)]) for x in (terms["erase"], slow))
    assert torch.allclose(fast, plain, rtol=1e-2, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("scale", [2.0, 3.0])
def test_the_erasing_half_of_a_round(scale: float, student: Any, new_backbone: Callable[..., Any], pair: Pair) -> None:
    """The teacher is the copy at the beginning of the round, and the optimiser is new."""
    slow_model = new_backbone()
    slow_model.load_erased(student.erased_state())
    teacher = new_backbone()
    teacher.load_erased(student.erased_state())
    weights = slow_model.unfreeze(LAYERS)
    search = searching(erase_lr=1e-3, scale=scale)
    search.rollout.prepare(student, [pair], Path(), 0)
    vector = torch.randn(1, 32, generator=seeded(3))
    search.erase(student, 0, token(student, NAME, vector), 1, 5)
    texts, empty = token(teacher, NAME, vector).states, teacher.encode([""]).states
    other = built(Rollout, steps=3, first_stop=1, timestep="list", batch=1)
    other.prepare(slow_model, [pair], Path(), 0)
    other.texts = [token(slow_model, NAME, vector)]
    generator = seeded(5 * 1_000_003 + 2)
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
    for _ in range(2):
        z, t = other(slow_model, 0, generator)
        with torch.no_grad():
            named, none = teacher.predict_noise(z, t, texts), teacher.predict_noise(z, t, empty)
        goal = named - (scale - 1) * (named - none)
        if scale == 2:
            assert torch.allclose(goal, none, atol=1e-6)
        optimizer.zero_grad()
        ((slow_model.predict_noise(z, t, texts) - goal) ** 2).mean().backward()
        optimizer.step()
    mine = [weight for weight in student.unet.parameters() if weight.requires_grad]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, weights, strict=True))
    assert all(weight.grad is None for weight in mine)


def test_the_attacking_half_of_a_round(student: Any, pair: Pair, tmp_path: Path) -> None:
    """On the second half of the images, with the weights as they are."""
    search = searching(templates=["a {}", "a big {}"], invert_lr=0.1, weight_decay=0.2)
    search.images.prepare(student, [pair], tmp_path, 0)
    found = search.invert(student, 0, NAME, 1, 0)
    bank, generator = search.images.banks[0], seeded(3)
    vector, mean, square = student.token_vectors("cat")[-1:], torch.zeros(1, 32), torch.zeros(1, 32)
    for step in (1, 2):
        chosen = 2 + torch.randint(2, (2,), generator=generator)
        t = torch.randint(1000, (2,), generator=generator)
        noise = torch.randn(2, 4, 8, 8, generator=generator)
        template = search.templates[int(torch.randint(2, (1,), generator=generator))]
        leaf = vector.clone().requires_grad_(True)
        states = student.encode([NamedPrompt.of(template, NAME)] * 2, vectors=leaf).states
        made = student.predict_noise(student.noisy_latents(bank[chosen], noise, t), t, states)
        gradient = torch.autograd.grad(((made - noise) ** 2).mean(), [leaf])[0]
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        scaled = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        vector = vector * (1 - 0.1 * 0.2) - 0.1 * scaled
    assert found.shape == (1, 32) and torch.allclose(found, vector, atol=1e-4)


@pytest.mark.slow
def test_a_stopped_search_gives_the_same_and_leaves_the_original_weights(
    new_backbone: Callable[..., Any], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = (new_backbone() for _ in range(2))
    for backbone in (straight, stopped):
        backbone.unfreeze(LAYERS)
    fresh = dict(new_backbone().unet.named_parameters())
    found = searching(erase_lr=1e-2)(straight, [pair], tmp_path / "one", 0)
    assert [len(own) for own in found] == [2] and not torch.equal(*found[0])
    assert all(torch.equal(value, fresh[name]) for name, value in straight.unet.named_parameters())

    invert, rounds = ThoroughSearch.invert, []

    def once(self: ThoroughSearch, backbone: Any, concept: int, name: str, number: int, *rest: Any) -> Tensor:
        rounds.append(number)
        if number == 1 and len(rounds) == 2:
            raise KeyboardInterrupt
        return invert(self, backbone, concept, name, number, *rest)

    monkeypatch.setattr(ThoroughSearch, "invert", once)
    with pytest.raises(KeyboardInterrupt):
        searching(erase_lr=1e-2)(stopped, [pair], tmp_path / "two", 0)
    assert all(torch.equal(value, fresh[name]) for name, value in stopped.unet.named_parameters())
    again = searching(erase_lr=1e-2)(stopped, [pair], tmp_path / "two", 0)
    assert rounds == [0, 1, 1] and all(torch.equal(a, b) for a, b in zip(found[0], again[0]))
    cached = searching(erase_lr=1e-2)(stopped, [pair], tmp_path / "two", 0)
    assert rounds == [0, 1, 1] and all(torch.equal(a, b) for a, b in zip(found[0], cached[0]))


def test_the_latents_say_what_they_show(new_backbone: Callable[..., Any], pair: Pair, tmp_path: Path) -> None:
    backbone = new_backbone()
    backbone.unfreeze(LAYERS)
    source = built(SearchedRollout, search=searching(), anchors="anchor", steps=3, batch=3, renew=2, chains=4)
    source.prepare(backbone, [pair], tmp_path, 0)
    z, _, known = source(backbone, 0, seeded(1))
    assert known["erase_states"].shape == (3, 3, 77, 32) and known["anchor_states"].shape == (3, 77, 32)
    assert all(any(torch.equal(one, other) for other in pair.anchor.states) for one in known["anchor_states"])
    assert set(known["prompts"].tolist()) <= {0, 1, 2} and z.shape == (3, 4, 8, 8)
    state = source.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == source.state_form([1])
    other = built(SearchedRollout, search=searching(), anchors="anchor", steps=3, batch=3, renew=2, chains=4)
    other.prepare(backbone, [pair], tmp_path, 0)
    other.load_state_dict(state, [1])
    one, two = source(backbone, 0, seeded(2)), other(backbone, 0, seeded(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[2]["prompts"], two[2]["prompts"])


def test_refusals_and_what_a_plan_counts(student: Any, pair: Pair) -> None:
    align = built(RobustErasing, parameters=LAYERS)
    align.prepare(student, [pair], Path(), 0)
    with pytest.raises(UserError, match="needs the texts of its search"):
        align.loss(student, pair, None, TrainingBatch(torch.randn(1, 4, 8, 8), torch.tensor([5]), 1), seeded())
    rollout = {"steps": 50, "batch": 1, "renew": 1}
    node = {"rounds": 2, "erase_steps": 200, "invert_steps": 3000, "images": {"batch": 1}, "rollout": rollout}
    assert ThoroughSearch.makes(node, [Concept("cat", "dog")], 99) == {"search cat": 2 * (200 * 55 + 9000)}
    assert ThoroughSearch.makes({**node, "rounds": 0}, [Concept("cat", "dog")], 99) == {}
