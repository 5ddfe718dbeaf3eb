"""Pairs whose states are encoded when they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from realera.contracts import Concept, NamedPrompt, Pair, UserError
from realera.training import pairs as room
from realera.training.editing import Mined
from realera.training.pairs import encoded_pairs

TEMPLATES = ("a photo of the {}", "a {}")
CONCEPTS = [Concept("cat", "field"), Concept("ship", "sky"), Concept("dog", "field")]


class AnimalTask:
    """The part of a task that `encoded_pairs` uses."""

    concepts = CONCEPTS

    def training_prompts(self, concept: Concept) -> list[tuple[NamedPrompt, NamedPrompt]]:
        return [(NamedPrompt.of(t, concept.target), NamedPrompt.of(t, concept.anchor)) for t in TEMPLATES]


@pytest.fixture
def recording_backbone(new_backbone: Callable[..., Any]) -> Any:
    """A backbone that records the names it encodes."""
    backbone = new_backbone()
    plain, backbone.asked = backbone.encode, []

    def encode(texts: Any, **settings: Any) -> Any:
        backbone.asked.append(texts[0].name)
        return plain(texts, **settings)

    backbone.encode = encode
    return backbone


def test_prompts_are_encoded_when_read_and_only_once(recording_backbone: Any) -> None:
    pairs = encoded_pairs(recording_backbone, AnimalTask())  # type: ignore[arg-type]
    assert [pair.concept for pair in pairs] == CONCEPTS and recording_backbone.asked == []
    assert pairs[2].anchor is pairs[0].anchor
    assert [pair.target.states.shape[0] for pair in (*pairs, *pairs)] == [2] * 6
    assert recording_backbone.asked == ["field", "cat", "ship", "dog"]


def test_the_memory_for_states_is_limited(recording_backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that are encoded again are the same, and so are the points mined from them."""
    whole = encoded_pairs(recording_backbone, AnimalTask())  # type: ignore[arg-type]
    states = [pair.target.states for pair in whole]
    monkeypatch.setattr(room, "KEPT", states[0].nbytes)
    recording_backbone.asked.clear()
    lean = encoded_pairs(recording_backbone, AnimalTask())  # type: ignore[arg-type]
    for _ in range(2):
        for pair, wanted in zip(lean, states):
            assert torch.equal(pair.target.states, wanted) and pair.target is pair.target
    assert recording_backbone.asked == ["cat", "ship", "dog", "ship", "dog"]


def test_the_edit_reads_a_pair_and_its_neighbours_together(
    recording_backbone: Any, load_method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = load_method("realera-text", "neighbours.m=1", "neighbours.n=2", "align=null")
    kept = [Pair(p.concept, p.target, p.anchor) for p in encoded_pairs(recording_backbone, AnimalTask())]  # type: ignore[arg-type]
    wanted = method.edit(recording_backbone, kept, Mined(method.neighbours, kept, 0)).map
    monkeypatch.setattr(room, "KEPT", 1)
    recording_backbone.asked.clear()
    lean = encoded_pairs(recording_backbone, AnimalTask())  # type: ignore[arg-type]
    found = method.edit(recording_backbone, lean, Mined(method.neighbours, lean, 0)).map
    assert torch.equal(found, wanted)
    assert recording_backbone.asked.count("ship") == recording_backbone.asked.count("dog") == 1


def test_a_prompt_that_is_cut_is_refused_before_any_is_encoded(recording_backbone: Any) -> None:
    task = AnimalTask()
    task.concepts = [*CONCEPTS, Concept("cat " * 80, "field")]
    with pytest.raises(UserError, match="is cut at 77 tokens"):
        encoded_pairs(recording_backbone, task)  # type: ignore[arg-type]
    assert recording_backbone.asked == []
