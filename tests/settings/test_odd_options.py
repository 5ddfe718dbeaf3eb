"""Choices that cannot be a file of their group: one sentence with the known ones, from the command line and Python."""

from __future__ import annotations

import pytest

from realera.contracts import UserError
from realera.settings import composition


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("method=3", "there is no method '3'; known: ac, "),
        ("method=true", "there is no method 'true'"),
        ("method=null", "there is no method 'null'"),
        ("method={a:1}", "there is no method '{a:1}'"),
        ("task=[1]", r"there is no task '\[1\]'; known: celebrity, "),
        ("judge=2", "there is no judge '2'"),
    ],
)
def test_an_odd_choice_is_answered_with_the_known_ones(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        composition.settings_of("train", [word, "concept=cat", "backbone=mini"])


def test_choices_that_are_allowed_are_not_blamed_for_another_fault() -> None:
    words = ["concept=cat", "backbone=mini", "logger=[wandb,csv]"]
    with pytest.raises(UserError, match="there is no setting 'sede'"):
        composition.settings_of("train", [*words, "sede=1"])
    assert composition.settings_of("train", [*words, "seed=1"])["seed"] == 1
