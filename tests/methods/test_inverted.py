"""Adversarial rounds: what an attack finds on the edited model is erased as well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from realera import paths
from realera.contracts import VALUES, Edit, NamedPrompt, UserError
from realera.methods.inverted import MEASURED, AdversarialRounds, edited
from realera.methods.latents import AnchorBank, drawn
from realera.methods.valera import ValueSpaceErasure

CAT, DOG = ("cat", "field"), ("dog", "sky")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))


def rounds(**more: Any) -> AdversarialRounds:
    bank = AnchorBank(images=3, batch=2, chunk=3, of="target")
    return AdversarialRounds(bank, **{"steps": 2, "start": "bird", "templates": ["a photo of a {}", "a {}"], **more})


def suffix_mean(states: Any) -> Tensor:
    rows = [states.states[i, int(first) :].double() for i, first in enumerate(states.first)]
    return torch.cat(rows).mean(dim=0)


class Told:
    """A search that finds known texts, and remembers the edits it was given."""

    def __init__(self, *found: str, won_back: Sequence[float] = (), until: float | None = None) -> None:
        self.found, self.rounds, self.edits = found, len(found), []  # type: ignore[var-annotated]
        self.shares, self.until = list(won_back) or [1.0] * len(found), until

    def __call__(self, backbone: Any, pairs: Any, edit: Edit, number: int, seed: int) -> list[Any]:
        self.edits.append(edit.map)
        word = self.found[number]
        return [backbone.encode([NamedPrompt.of("a {}", f"{word} {pair.concept.target}")]) for pair in pairs]

    def won_back(self, backbone: Any, pairs: Any, edit: Edit, texts: Any, seed: int) -> Tensor:
        assert edit.map is self.edits[-1] and len(texts) == len(pairs)
        return self.shares[len(self.edits) - 1] - torch.arange(len(pairs), dtype=torch.float64)


@pytest.mark.parametrize("concepts", [[CAT], [CAT, DOG]], ids=len)
def test_found_states_become_the_anchor(concepts: Any, new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, *concepts)
    search = Told("red", "old")
    edit = ValueSpaceErasure(gain=1, search=search)(backbone, pairs, [])  # type: ignore[arg-type]
    final = edit.map
    assert final is not None and torch.allclose(final @ final, final, atol=1e-8)
    erased = backbone.width - float(final.trace())  # of a projection: the number of its directions that are 0
    assert erased > 2 * len(pairs) + 0.5, "more than the names' directions"
    assert torch.allclose(search.edits[0], ValueSpaceErasure(gain=1)(backbone, pairs, []).map, atol=1e-12)
    for number, word in enumerate(search.found):
        for pair in pairs:
            found = suffix_mean(backbone.encode([NamedPrompt.of("a {}", f"{word} {pair.concept.target}")]))
            anchor = suffix_mean(pair.anchor)
            still = search.edits[number] @ found
            assert float((still - anchor).norm()) > 1e-3
            assert torch.allclose(final @ still, final @ anchor, atol=1e-7)
            assert torch.allclose(final @ suffix_mean(pair.target), final @ anchor, atol=1e-7)
    empty = backbone.encode([""]).states[0].double()
    for row in (empty[0], empty[1:].mean(dim=0)):
        assert float((final @ row - row).norm() / row.norm()) < 1e-9
    assert {"share_before_round_1", "share_before_round_2"} < edit.info.keys()


def test_the_search_attacks_the_edited_model_and_leaves_it_as_it_was(new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, CAT, DOG)
    before = {name: weight.clone() for name, weight in backbone.unet.state_dict().items()}
    identity = torch.eye(backbone.width, dtype=torch.float64)
    search = rounds()
    plain = search(backbone, pairs, Edit(map=identity, projections=(VALUES,)), 0, 0)
    other = search(backbone, pairs, Edit(map=0.5 * identity, projections=(VALUES,)), 0, 0)
    assert len(plain) == 2 and plain[0].states.shape[0] == 2
    assert not torch.equal(plain[0].states, other[0].states), "the loss is that of the edited U-Net"
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.unet.state_dict().items())
    passes = backbone.passes
    again = search(backbone, pairs, Edit(map=identity, projections=(VALUES,)), 0, 0)
    assert torch.equal(again[0].states, plain[0].states) and backbone.passes == passes, "found vectors are cached"
    longer = rounds(steps=3)(backbone, pairs, Edit(map=identity, projections=(VALUES,)), 0, 0)
    next_round, next_seed = (search(backbone, pairs, Edit(map=identity), *one) for one in ((1, 0), (0, 1)))
    assert not any(torch.equal(one[0].states, plain[0].states) for one in (longer, next_round, next_seed))


def test_the_weights_return_after_an_error(new_backbone: Any) -> None:
    backbone = new_backbone()
    before = [layer.weight.clone() for layer in backbone.text_projections().values()]
    with pytest.raises(KeyboardInterrupt), edited(backbone, Edit(map=torch.zeros(backbone.width, backbone.width))):
        assert not any(layer.weight.any() for layer in backbone.text_projections().values())
        raise KeyboardInterrupt
    layers = backbone.text_projections().values()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_its_passes_are_planned_and_bad_settings_refused() -> None:
    node = {"rounds": 3, "steps": 10, "images": {"batch": 4}}
    assert AdversarialRounds.makes(node, [], 20) == {}
    from realera.contracts import Concept

    assert AdversarialRounds.makes(node, [Concept("cat", "sky")], 20) == {"search cat": 3 * 3 * 10 * 4}
    node = {"rounds": 3, "steps": 10, "images": {"batch": 4, "images": 5}}
    measured = 3 * 5 * MEASURED
    assert AdversarialRounds.makes(node, [Concept("cat", "sky")], 20) == {"search cat": 3 * (3 * 10 * 4 + measured)}
    with pytest.raises(UserError, match="templates is empty"):
        rounds(templates=[])


# --- stopping early --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "until", "erased"),
    [([0.9, 0.3, 0.05], 0.1, 2), ([0.9, 0.1, 0.9], 0.1, 1), ([0.05, 0.9, 0.9], None, 3), ([0.0, 0.9, 0.9], 0.0, 0)],
)
def test_a_round_that_wins_little_back_is_not_erased_and_is_the_last(
    shares: list[float], until: float | None, erased: int, new_backbone: Any, new_pairs: Any
) -> None:
    """The result is that of as many rounds as were erased. The largest share of several concepts decides."""
    backbone = new_backbone()
    pairs = new_pairs(backbone, CAT, DOG)
    words = ["red", "old", "small"]
    search = Told(*words, won_back=shares, until=until)
    edit = ValueSpaceErasure(search=search)(backbone, pairs, [])  # type: ignore[arg-type]
    fewer = ValueSpaceErasure(search=Told(*words[:erased]))(backbone, pairs, [])  # type: ignore[arg-type]
    assert edit.map is not None and torch.equal(edit.map, fewer.map)  # type: ignore[arg-type]
    made = min(erased + 1, 3)
    assert len(search.edits) == made and edit.info["rounds_erased"] == erased
    told = {key: value for key, value in edit.info.items() if key.startswith("won_back")}
    assert told == {f"won_back_round_{i + 1}": pytest.approx(shares[i]) for i in range(made)}
    assert "rounds_erased" not in ValueSpaceErasure()(backbone, pairs, []).info


def test_the_share_that_is_won_back_is_measured_on_the_same_noised_images(new_backbone: Any, new_pairs: Any) -> None:
    """Against losses of one image at a time, on a copy of the model that has the edit."""
    backbone, other = new_backbone(), new_backbone()
    (pair,) = pairs = new_pairs(backbone, CAT)
    identity = torch.eye(backbone.width, dtype=torch.float64)
    edit = Edit(
        map=identity + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1)), projections=(VALUES,)
    )
    search = rounds()
    found = backbone.encode(["a big red cat", "a dog"])
    before = [layer.weight.clone() for layer in backbone.text_projections().values()]
    passes = backbone.passes
    (share,) = search.won_back(backbone, pairs, edit, [found], 7).tolist()
    assert all(torch.equal(a.weight, b) for a, b in zip(backbone.text_projections().values(), before, strict=True))

    bank = drawn(backbone, pair.target, 3, 3, None, paths.cache_dir(), 7, "")
    assert backbone.passes - passes == 3 * 2 * 2 + 3 * 3 * MEASURED, "three images drawn, and three losses"
    draw = torch.Generator().manual_seed(7 * 1_000_003 + 64)
    noised = []
    for _ in range(MEASURED):  # chunks of three
        t = backbone.draw_timesteps(3, draw)
        noise = torch.randn(3, *bank.shape[1:], generator=draw)
        noised.append((backbone.noisy_latents(bank, noise, t), t, noise))

    def loss(model: Any, texts: list[str]) -> float:
        total, number = 0.0, 0
        for z_t, t, noise in noised:
            for i in range(3):
                states = model.encode([texts[number % len(texts)]]).states
                predicted = model.predict_noise(z_t[i : i + 1], t[i : i + 1], states)
                total, number = total + float((predicted - noise[i]).double().square().mean()), number + 1
        return total / number

    with torch.no_grad():
        of_name = loss(other, ["a photo of a cat", "a cat"])
        other.apply(edit)
        of_anchor, of_found = loss(other, ["a photo of a field", "a field"]), loss(other, ["a big red cat", "a dog"])
    slow = (of_anchor - of_found) / (of_anchor - of_name) if of_anchor > of_name else 0.0
    assert share == pytest.approx(slow, rel=1e-3, abs=1e-9) and of_anchor != of_name


def test_the_two_ends_of_the_share(new_backbone: Any, new_pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, CAT)
    search, edit = rounds(), Edit(map=torch.eye(backbone.width, dtype=torch.float64), projections=(VALUES,))
    name, anchor = (backbone.encode([f"a photo of a {word}", f"a {word}"]) for word in ("cat", "field"))
    losses = iter([1.0, 3.0, 2.0, 3.0, 1.0, 1.0])
    with monkeypatch.context() as changed:
        changed.setattr(AdversarialRounds, "_loss", lambda *_, **__: next(losses))
        assert search.won_back(backbone, pairs, edit, [name], 0).tolist() == [0.5]
        assert search.won_back(backbone, pairs, edit, [name], 0).tolist() == [0.0], "the name is worse than the anchor"
    ends = [float(search.won_back(backbone, pairs, edit, [texts], 0)) for texts in (anchor, name)]
    assert ends[0] == 0.0 and ends[1] in (0.0, 1.0), "without an edit, the name wins itself back"


def test_until_is_a_share_and_does_not_move_the_cached_vectors(new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, CAT)
    edit = Edit(map=torch.eye(backbone.width, dtype=torch.float64), projections=(VALUES,))
    plain = rounds()(backbone, pairs, edit, 0, 0)
    passes = backbone.passes
    stopping = rounds(until=0.5, rounds=4)(backbone, pairs, edit, 0, 0)
    assert torch.equal(plain[0].states, stopping[0].states) and backbone.passes == passes
