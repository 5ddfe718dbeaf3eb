"""Adversarial rounds: what an attack finds on the edited model is erased as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from realera.contracts import VALUES, Edit, NamedPrompt, UserError
from realera.methods.inverted import AdversarialRounds, edited
from realera.methods.latents import AnchorBank
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

    def __init__(self, *found: str) -> None:
        self.found, self.rounds, self.edits = found, len(found), []  # type: ignore[var-annotated]

    def __call__(self, backbone: Any, pairs: Any, edit: Edit, number: int, seed: int) -> list[Any]:
        self.edits.append(edit.map)
        word = self.found[number]
        return [backbone.encode([NamedPrompt.of("a {}", f"{word} {pair.concept.target}")]) for pair in pairs]


@pytest.mark.parametrize("concepts", [[CAT], [CAT, DOG]], ids=len)
def test_found_states_become_the_anchor(concepts: Any, new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, *concepts)
    search = Told("red", "old")
    edit = ValueSpaceErasure(gain=1, search=search)(backbone, pairs, [])  # type: ignore[arg-type]
    final = edit.map
    assert final is not None and torch.allclose(final @ final, final, atol=1e-8)
    assert backbone.width - int(torch.linalg.matrix_rank(final)) > 2 * len(pairs), "more than the names' directions"
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
    with pytest.raises(UserError, match="templates is empty"):
        rounds(templates=[])
