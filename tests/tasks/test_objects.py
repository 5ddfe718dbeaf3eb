from collections import Counter
from typing import Any

import pytest
import yaml

from realera.contracts import Concept, UserError
from realera.paths import TASK_DATA
from realera.tasks.celebrities import CelebrityTask
from realera.tasks.nsfw import NsfwTask
from realera.tasks.objects import ObjectTask
from realera.tasks.people import PeopleTask
from realera.tasks.styles import StyleTask

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COUNTS = {"erase": 40, "near": 16, "keep": 16, "associated": 10, "unseen": 10}
DATA: dict[str, Any] = yaml.safe_load((TASK_DATA / "objects.yaml").read_text(encoding="utf-8"))


def test_the_file_has_ten_classes_with_three_synonyms_and_four_phrases_each() -> None:
    assert list(DATA["classes"]) == CLASSES
    for name, words in DATA["classes"].items():
        assert len(words["synonyms"]) == 3, name
        assert len(words["associated"]) == 4, name
        assert len(words["unseen"]["names"]) + len(words["unseen"]["phrases"]) == 4, name


def test_no_associated_or_unseen_phrase_names_its_class_or_a_synonym() -> None:
    for name, words in DATA["classes"].items():
        for phrase in [*words["associated"], *words["unseen"]["names"], *words["unseen"]["phrases"]]:
            said = f" {phrase.lower()} "
            assert not [w for w in (name, *words["synonyms"]) if f" {w} " in said], (name, phrase)


def test_the_mode_of_objects_is_the_mean_probability() -> None:
    """As in MACE and RealEra; top-1 of the same images is reported too."""
    task = ObjectTask("airplane")
    assert task.headline == dict.fromkeys(("acc_e", "acc_s", "acc_g", "acc_a", "acc_u"), "mean_prob")
    assert task.h_o_terms == ("acc_e", "acc_s", "acc_g")


def test_splits_are_counted_and_worded_as_the_protocol_says() -> None:
    prompts = ObjectTask("airplane", images=COUNTS).eval_prompts()
    assert Counter(p.split for p in prompts) == {"erase": 40, "near": 48, "keep": 144, "associated": 40, "unseen": 40}
    by_split = {s: list(dict.fromkeys(p.text for p in prompts if p.split == s)) for s in COUNTS}
    assert by_split["erase"] == ["a photo of the airplane"]
    assert by_split["near"] == ["a photo of the aircraft", "a photo of the plane", "a photo of the jet"]
    assert by_split["keep"] == [f"a photo of the {c}" for c in CLASSES[1:]]
    assert by_split["associated"][0] == "An-225 Mriya taking off from the airport"
    assert by_split["unseen"][:3] == [
        "a photo of the jetliner",
        "a photo of the Boeing 747",
        "a passenger flight above the clouds",
    ]
    assert {p.concept for p in prompts if p.split != "keep"} == {"airplane"}
    assert {p.concept for p in prompts if p.split == "keep"} == set(CLASSES[1:])


@pytest.mark.parametrize("name", CLASSES)
def test_ids_are_unique_plain_and_the_same_each_time(name: str) -> None:
    prompts = ObjectTask(name, images=COUNTS).eval_prompts()
    ids = [p.id for p in prompts]
    assert len(set(ids)) == len(ids)
    assert all(set(i) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for i in ids)
    assert prompts == ObjectTask(name, images=COUNTS).eval_prompts()


def test_seeds_do_not_depend_on_the_concept() -> None:
    def keep(concept: str) -> list[Any]:
        return [p for p in ObjectTask(concept, images=COUNTS).eval_prompts() if p.concept == "cat"]

    assert keep("airplane") == keep("dog") != []
    assert {p.seed for p in ObjectTask("cat", images={"erase": 3}, first_seed=100).eval_prompts()} == {100, 101, 102}


def test_anchors_are_the_files_own_unless_typed() -> None:
    assert ObjectTask("Airplane").concepts == [Concept("airplane", "sky")]
    assert ObjectTask("airplane", anchor="field").concepts == [Concept("airplane", "field")]
    both = ObjectTask(["airplane", "cat"], anchor=["sea", "road"])
    assert both.concepts == [Concept("airplane", "sea"), Concept("cat", "road")]


def test_training_prompts_pair_the_same_template() -> None:
    task = ObjectTask("airplane")
    pairs = task.training_prompts(task.concepts[0])
    assert len(pairs) == len(DATA["training_templates"])
    texts = [(target.text, anchor.text) for target, anchor in pairs]
    assert texts[0] == ("a photo of the airplane", "a photo of the sky")
    assert ("a photo of an airplane", "a photo of a sky") in texts
    assert {(target.name, anchor.name) for target, anchor in pairs} == {("airplane", "sky")}


@pytest.mark.parametrize("task", [ObjectTask, CelebrityTask, StyleTask, NsfwTask])
def test_typed_templates_replace_the_task_s(task: Any) -> None:
    built = task("airplane", anchor="art", templates=["a famous art by {}", "my {} at home"])
    (first, second) = built.training_prompts(built.concepts[0])
    assert [prompt.text for prompt in (*first, *second)] == [
        "a famous art by airplane",
        "a famous art by art",
        "my airplane at home",
        "my art at home",
    ]
    assert first[1].start == len("a famous art by ")


def test_several_erased_concepts_are_not_preserved() -> None:
    prompts = ObjectTask(["airplane", "cat"], images=COUNTS).eval_prompts()
    assert {p.concept for p in prompts if p.split == "keep"} == set(CLASSES) - {"airplane", "cat"}
    assert {p.text for p in prompts if p.split == "near" and p.concept == "cat"} == {
        f"a photo of the {w}" for w in ("feline", "kitty", "housecat")
    }


def test_any_concept_with_an_anchor_can_be_erased() -> None:
    task = ObjectTask("tractor", anchor="field", images=COUNTS, synonyms=["harvester"], unseen=["ploughing the land"])
    prompts = task.eval_prompts()
    assert task.labels == (*CLASSES, "tractor")
    assert {p.text for p in prompts if p.split == "near"} == {"a photo of the harvester"}
    assert {p.text for p in prompts if p.split == "unseen"} == {"ploughing the land"}
    assert {p.concept for p in prompts if p.split == "keep"} == set(CLASSES)
    assert not [p for p in prompts if p.split == "associated"]


def test_typed_words_replace_the_file_s() -> None:
    task = ObjectTask("airplane", synonyms=["airliner"], unseen=["high above the clouds"])
    prompts = task.protocol()["prompts"]
    assert prompts["near"] == ["a photo of the airliner"]
    assert prompts["unseen"] == ["high above the clouds"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"concepts": None}, "concept is empty"),
        ({"concepts": " "}, "concept is empty"),
        ({"concepts": []}, "concept is empty"),
        ({"concepts": "word " * 2000}, "2000 words"),
        ({"concepts": "zebra"}, "anchor=sky"),
        ({"concepts": "airplan"}, "did you mean 'airplane'"),
        ({"concepts": "plane"}, "concept=airplane"),
        ({"concepts": "airplane", "anchor": "Airplane"}, "another"),
        ({"concepts": "airplane", "anchor": "jet"}, "another"),
        ({"concepts": "airplane", "anchor": ""}, "anchor is empty"),
        ({"concepts": ["cat", "Cat"]}, "once"),
        ({"concepts": ["cat", "dog"], "anchor": ["sky"]}, "1 anchors for 2 concepts"),
        ({"concepts": ["cat", "dog"], "synonyms": ["moggy"]}, "one at a time"),
        ({"concepts": "cat", "images": {"erase": 0}}, "use 1 or more for erase"),
        ({"concepts": "cat", "images": {"erase": 2, "near": -1}}, "use 1 or more for erase"),
        ({"concepts": "cat", "images": {"erase": 2, "naer": 3}}, "'naer'"),
        ({"concepts": "cat", "first_seed": -1}, "negative"),
        ({"concepts": "cat", "templates": ["a photo"]}, "once"),
        ({"concepts": "cat", "data": "celebrities.yaml"}, "task.data=celebrities.yaml is not for this task (template"),
        ({"concepts": "cat", "data": "../x.yaml"}, "task.data=../x.yaml cannot be read: leave it out"),
        ({"concepts": "cat", "data": "nowhere.yaml"}, "task.data=nowhere.yaml cannot be read"),
        ({"concepts": "cat", "data": "nsfw_prompts.csv"}, "task.data=nsfw_prompts.csv "),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        ObjectTask(**arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", [CelebrityTask, StyleTask, NsfwTask, ObjectTask])
def test_a_data_file_of_another_shape_is_refused(task: Any) -> None:
    people = ("celebrities.yaml", "artists.yaml")
    for data in (*people, "nsfw.yaml", "objects.yaml"):
        if data.startswith(task.name[:6]) or (issubclass(task, PeopleTask) and data in people):
            task("Tom Cruise", "a person", data=data) if data in people else task("cat", "sky", data=data)
        elif data != "nsfw.yaml" or not issubclass(task, PeopleTask):
            with pytest.raises(UserError, match=rf"task\.data={data} is not for this task \(\w+ "):
                task("cat", "sky", data=data)


def test_the_protocol_has_everything_that_the_numbers_depend_on() -> None:
    protocol = ObjectTask("ship", images=COUNTS, first_seed=7).protocol()
    assert protocol["concepts"] == [{"target": "ship", "anchor": "ground"}]
    assert protocol["images_per_prompt"] == COUNTS
    assert protocol["first_seed"] == 7
    assert protocol["prompts"]["erase"] == ["a photo of the ship"]
    assert protocol["version"] == DATA["version"]
