"""Pairs whose states are made when they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from realera.contracts import Concept, NamedPrompt, Pair, UserError
from realera.training import pairs as room
from realera.training.callbacks import Mined
from realera.training.pairs import encoded_pairs

TEMPLATES = ("a photo of the {}", "a {}")
CONCEPTS = [Concept("cat", "field"), Concept("ship", "sky"), Concept("dog", "field")]


class Animals:
    """As much of a task as is read here."""

    concepts = CONCEPTS

    def training_prompts(self, concept: Concept) -> list[tuple[NamedPrompt, NamedPrompt]]:
        return [(NamedPrompt.of(t, concept.target), NamedPrompt.of(t, concept.anchor)) for t in TEMPLATES]


@pytest.fixture
def watched(new_backbone: Callable[..., Any]) -> Any:
    """A backbone that keeps a list of the names it encodes."""
    backbone = new_backbone()
    plain, backbone.asked = backbone.encode, []

    def encode(texts: Any, **settings: Any) -> Any:
        backbone.asked.append(texts[0].name)
        return plain(texts, **settings)

    backbone.encode = encode
    return backbone


def test_nothing_is_encoded_before_it_is_read_and_nothing_twice(watched: Any) -> None:
    pairs = encoded_pairs(watched, Animals())  # type: ignore[arg-type]
    assert [pair.concept for pair in pairs] == CONCEPTS and watched.asked == []
    assert pairs[2].anchor is pairs[0].anchor
    assert [pair.target.states.shape[0] for pair in (*pairs, *pairs)] == [2] * 6
    assert watched.asked == ["field", "cat", "ship", "dog"]


def test_what_is_held_is_bounded(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same states whenever they are read, and so the same points."""
    whole = encoded_pairs(watched, Animals())  # type: ignore[arg-type]
    states = [pair.target.states for pair in whole]
    monkeypatch.setattr(room, "KEPT", states[0].nbytes)
    watched.asked.clear()
    lean = encoded_pairs(watched, Animals())  # type: ignore[arg-type]
    for _ in range(2):
        for pair, wanted in zip(lean, states):
            assert torch.equal(pair.target.states, wanted) and pair.target is pair.target
    assert watched.asked == ["cat", "ship", "dog", "ship", "dog"]


def test_the_edit_reads_a_pair_and_its_neighbours_together(
    watched: Any, load_method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = load_method("realera-text", "neighbours.m=1", "neighbours.n=2", "align=null")
    kept = [Pair(p.concept, p.target, p.anchor) for p in encoded_pairs(watched, Animals())]  # type: ignore[arg-type]
    wanted = method.edit(watched, kept, Mined(method.neighbours, kept, 0)).map
    monkeypatch.setattr(room, "KEPT", 1)
    watched.asked.clear()
    lean = encoded_pairs(watched, Animals())  # type: ignore[arg-type]
    found = method.edit(watched, lean, Mined(method.neighbours, lean, 0)).map
    assert torch.equal(found, wanted)
    assert watched.asked.count("ship") == watched.asked.count("dog") == 1


def test_a_prompt_that_is_cut_is_refused_before_any_is_encoded(watched: Any) -> None:
    task = Animals()
    task.concepts = [*CONCEPTS, Concept("cat " * 80, "field")]
    with pytest.raises(UserError, match="is cut at 77 tokens"):
        encoded_pairs(watched, task)  # type: ignore[arg-type]
    assert watched.asked == []
