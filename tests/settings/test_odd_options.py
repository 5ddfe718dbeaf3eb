"""Choices that cannot be a file of their group: one sentence with the known ones, from the command line and Python."""

from __future__ import annotations

import re

import pytest
from hydra.errors import HydraException

from realera.contracts import UserError
from realera.settings import composition, error_sentences


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


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (
            "train",
            ["method=valera", "method.edit.ridge=1"],
            "method=valera .*: leave it out, or choose .*or uce, which",
        ),
        ("train", ["method=valera", "method.edit.pric=1"], "method=valera .*; did you mean 'method.edit.price'"),
        ("train", ["method=valera", "method.zzz=1"], r"method=valera .*valera\.yaml lists its settings"),
        ("train", ["task.imags=1"], "task=object has no setting .*'task.images'"),
        (
            "attack",
            ["attack=random", "attack.steps=3"],
            r"attack=random .*: leave it out, or choose attack=.*inversion",
        ),
        ("attack", ["attack=random", "attack.tris=3"], "attack=random .*; did you mean 'attack.tries'"),
        ("attack", ["attack=random", "attack.genertions=3"], r"attack=random .*random\.yaml lists its settings"),
        ("train", ["method=uce", "method.align.steps=3"], "method.align is null with method=uce"),
    ],
)
def test_a_setting_that_an_option_lacks_names_the_option_and_stays_in_its_group(
    command: str, words: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        composition.settings_of(command, [*words, "concept=cat", "backbone=mini"])


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("attack", ["attack=prompts,mma", "attack.csv=a.csv"], "attack=mma has no setting .*choose attack=prompts"),
        ("attack", ["attack=mma,inpaint", "attack.steps=2"], "attack=inpaint has no setting"),
        ("train", ["method=uce,valera", "method.edit.gain=1"], "method=uce has no setting .*choose method=valera"),
        ("train", ["method=valera,esd-x", "method.edit.gain=1"], "method.edit is null with method=esd-x"),
    ],
)
def test_of_several_options_the_one_without_the_setting_is_named(command: str, words: list[str], said: str) -> None:
    error = HydraException(f"Could not override '{words[1].partition('=')[0]}'.")
    assert re.search(said, error_sentences.of_config(error, command, [*words, "concept=cat", "backbone=mini"]))


@pytest.mark.parametrize(
    ("command", "words", "listed"),
    [
        ("train", "concept=cat,dog", "type 'concept=[cat,dog]' to erase all of them together"),
        ("train", "anchor=sky,a room", "type the list 'anchor=[sky,a room]'"),
        ("generate", "seeds=0,1", "type the list 'seeds=[0,1]'"),
        ("residue", "texts=a,b", "type the list 'texts=[a,b]'"),
        ("train", "seed=0,1", ""),
    ],
)
def test_several_values_are_offered_as_a_list_where_the_setting_takes_one(
    command: str, words: str, listed: str
) -> None:
    with pytest.raises(UserError) as refused:
        composition.settings_of(command, [words, "backbone=mini"] if command == "train" else [words])
    said = str(refused.value)
    assert "add -m to run one job for each" in said and "if it is one text" in said
    assert listed in said if listed else "[" not in said


def test_several_values_beside_settings_that_do_not_compose_are_still_named() -> None:
    with pytest.raises(UserError, match=r"backbone\.name=1,2 has several values: add -m"):
        composition.settings_of("train", ["backbone=null", "backbone.name=1,2"])
