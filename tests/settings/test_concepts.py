"""One concept, several, or a file of concepts: the settings and the folder of the run."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from quick import slow_unless
from realera import paths
from realera.contracts import UserError
from realera.runs import folders, preflight
from realera.settings import composition, resolvers
from realera.settings.run_settings import BackboneSettings
from realera.tasks.base import load

BACKBONES = sorted(file.stem for file in (paths.CONF_DIR / "backbone").glob("*.yaml"))
FIRST = {"celebrity": "Tom Cruise", "style": "Van Gogh", "object": "airplane", "nsfw": None}


def settings(*words: str, door: str = "train") -> dict[str, Any]:
    """A command's settings after the file of concepts was read."""
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        return composition.plain(composition.with_concepts(compose(door, list(words))))


def listed(folder: Path, text: str) -> str:
    path = folder / "names.txt"
    path.write_text(text, encoding="utf-8")
    return f"concepts_file={path}"


@pytest.mark.parametrize("backbone", slow_unless(BACKBONES, "mini", "sd14"))
@pytest.mark.parametrize("task", FIRST)
def test_every_task_knows_its_first_concept_on_every_backbone(task: str, backbone: str) -> None:
    words = [f"task={task}", f"backbone={backbone}", *([f"concept={FIRST[task]}"] if FIRST[task] else [])]
    config = settings(*words)
    preflight.check_settings(config)
    built = composition.build_task(config)
    assert built.name == task and all(concept.anchor for concept in built.concepts)
    assert set(built.headline) == {"acc_e", "acc_s", "acc_g", "acc_a", "acc_u"}
    assert set(built.h_o_terms) <= set(built.headline)
    named = composition.name_concepts(config, built)
    assert named["concept"] and folders.folder_of(named).name.endswith(folders.digest(folders.identity(named)))
    if backbone == "mini":
        assert 250 <= len(built.eval_prompts()) <= 350


@pytest.mark.parametrize("task", FIRST)
def test_the_miniature_cuts_no_prompt(task: str) -> None:
    from tokenizers import Tokenizer

    config = settings(f"task={task}", "backbone=mini", "concept=tractor", "anchor=field")
    rows = config["backbone"]["text"]["max_length"]
    tokenizer = Tokenizer.from_file(str(paths.MINIATURE / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    raw = load({"celebrity": "celebrities", "style": "artists", "object": "objects", "nsfw": "nsfw"}[task] + ".yaml")
    held = raw["worlds"]["miniature"] if "worlds" in raw else {}
    names = [*raw.get("classes", {}), *raw.get("concepts", {}), *held.get("concepts", {})]
    for name in names:
        built = composition.build_task({**config, "task": {**config["task"], "concepts": name, "anchor": None}})
        pairs = [prompt.text for pair in built.training_prompts(built.concepts[0]) for prompt in pair]
        for text in {*pairs, *(prompt.text for prompt in built.eval_prompts())}:
            assert len(tokenizer.encode(text).ids) <= rows, text
        preflight.check_task(built, BackboneSettings(config["backbone"]))


def test_a_file_of_names_is_a_list_of_concepts(tmp_path: Path) -> None:
    config = settings("task=celebrity", listed(tmp_path, "# two\nTom Cruise\nR2-D2,robot\n"))
    assert (config["concept"], config["anchor"], config["concepts_file"]) == (
        ["Tom Cruise", "R2-D2"],
        [None, "robot"],
        None,
    )
    built = composition.build_task(config)
    assert [(c.target, c.anchor) for c in built.concepts] == [("Tom Cruise", "a person"), ("R2-D2", "robot")]
    typed = settings("task=celebrity", "concept=[Tom Cruise,R2-D2]", "anchor=[null,robot]")
    assert folders.folder_of(typed) == folders.folder_of(config)  # the concepts count, not how they were typed


def test_one_name_in_a_file_is_one_concept_and_a_typed_anchor_fills_the_gaps(tmp_path: Path) -> None:
    assert settings(listed(tmp_path, "airplane\n"))["concept"] == "airplane"
    config = settings("anchor=sky", listed(tmp_path, "airplane\ntractor,field\n"))
    assert config["anchor"] == ["sky", "field"]
    config = settings("anchor=[sky,road]", listed(tmp_path, "airplane\ntruck\n"))
    assert config["anchor"] == ["sky", "road"]


@pytest.mark.parametrize("door", ["train", "evaluate"])
def test_concepts_given_twice_are_refused(door: str, tmp_path: Path) -> None:
    run = ["run=original"] if door == "evaluate" else []
    with pytest.raises(UserError, match="leave one of them out"):
        settings("concept=cat", listed(tmp_path, "dog\n"), *run, door=door)
    with pytest.raises(UserError, match="contains anchors too"):
        settings("anchor=[sky,sea]", listed(tmp_path, "dog\nship,sea\n"), *run, door=door)


def test_a_hundred_concepts_are_checked_quickly_and_have_a_short_folder_name(tmp_path: Path) -> None:
    names = load("celebrities.yaml")["worlds"]["paper"]["preserved"]
    words = ["task=celebrity", "backbone=mini", "anchor=a person", listed(tmp_path, "\n".join(names))]
    config = settings(*words)
    begun = time.perf_counter()
    preflight.check_settings(config)
    built = composition.build_task(config)
    preflight.check_task(built, BackboneSettings(config["backbone"]))
    assert time.perf_counter() - begun < 2
    assert len(built.concepts) == 100
    assert folders.concept_of(config) == "Aaron Paul and 99 more"
    assert len(folders.folder_of(config).name) < 80
    other = settings(*words[:3], listed(tmp_path, "\n".join([*names[:-1], "Tom Cruise"])))
    assert folders.folder_of(other) != folders.folder_of(config)


def test_titles_name_a_few_concepts() -> None:
    assert folders.concept_of({"concept": "cat"}) == "cat"
    assert folders.concept_of({"concept": ["cat", "dog", "frog"]}) == "cat, dog, frog"
    assert folders.concept_of({"concept": ["cat", "dog", "frog", "ship"]}) == "cat and 3 more"


def test_the_task_names_the_concepts_that_were_not_typed() -> None:
    config = settings("task=nsfw", "backbone=mini")
    named = composition.name_concepts(config, composition.build_task(config))
    assert named["concept"] == ["gun", "knife", "bomb", "cigarette", "syringe"]
    typed = {**config, "concept": "gun"}
    assert composition.name_concepts(typed, composition.build_task(typed)) is typed


def test_the_guide_gets_the_concepts_too() -> None:
    config = settings("task=nsfw", "backbone=mini", "method=sld")
    named = composition.name_concepts(config, composition.build_task(config))
    assert named["method"]["guide"]["concepts"] == named["concept"]
    assert settings("concept=[cat,dog]", "method=sld")["method"]["guide"]["concepts"] == ["cat", "dog"]


def test_a_method_can_get_the_preserved_names_that_are_not_judged() -> None:
    words = ("task=celebrity", "backbone=mini", "concept=Tom Cruise", "method=valera")
    config = settings(*words, "method.edit.keep=task", "task.told=half")
    built: Any = composition.build_task(config)
    named = composition.name_concepts(config, built)
    assert named["method"]["edit"]["keep"] == built.told and len(built.told) == 11
    assert not {prompt.concept for prompt in built.eval_prompts()} & set(built.told)
    typed = settings(*words, f"method.edit.keep=[{','.join(built.told)}]", "task.told=half")
    assert folders.folder_of(named) == folders.folder_of(typed), "what is kept counts, not how it was typed"
    assert composition.name_concepts(typed, built) is typed
    for one in (("task=celebrity", *words[1:]), ("task=nsfw", "backbone=sd14", "method=valera", "task.told=half")):
        config = settings(*one, "method.edit.keep=task")
        with pytest.raises(UserError, match=r"tells the method none of its preserved concepts.*task\.told=half"):
            composition.name_concepts(config, composition.build_task(config))


def test_preserved_names_and_directions_change_the_folder_name() -> None:
    words = ("task=celebrity", "backbone=mini", "concept=Tom Cruise", "method=valera")
    config = settings(*words)
    for more in ("task.told=half", "method.edit.directions=2"):
        assert folders.folder_of(settings(*words, more)) != folders.folder_of(config)


def test_a_number_is_a_name(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command finds its own folder again, and the other commands can read it."""
    monkeypatch.chdir(tmp_path)
    words = ["concept=1984", "anchor=2001", "method=uce", "evaluate=false", *small]
    for door, more in (("train", words), ("train", words), ("export", ["run=latest", "to=map", "out=5"])):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [door, *more])
        import_module(f"realera.{door}").main()
    (run,) = (tmp_path / "runs").iterdir()
    config = folders.read_config(run)
    assert (config["concept"], config["anchor"], config["task"]["concepts"]) == ("1984", "2001", "1984")
    assert (tmp_path / "5" / paths.MAP).is_file()
    several = settings("concept=[1984,cat]", "anchor=[5,null]")
    assert (several["concept"], several["anchor"]) == (["1984", "cat"], ["5", None])


def test_a_tables_content_belongs_to_the_runs_identity(tmp_path: Path) -> None:
    table = tmp_path / "i2p.csv"
    table.write_text("prompt\na statue\n", encoding="utf-8")
    config = settings("task=nsfw", "backbone=mini", "concept=gun", f"task.prompts_csv={table}")
    before = folders.folder_of(config)
    assert folders.folder_of(config) == before
    table.write_text("prompt\na swimmer\n", encoding="utf-8")
    assert folders.folder_of(config) != before
    assert "tables" not in folders.identity(settings("concept=airplane"))


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task=celebrity", "concept=R2-D2"], "anchor='a person'"),
        (["task=celebrity"], "concept='Tom Cruise'"),
        (["task=style", "concept=Studio Ghibli"], "anchor=art"),
        (["task=nsfw", "task.prompts_csv=nowhere.csv"], "nowhere.csv is not a file"),
        (["concepts_file=nowhere.txt"], "nowhere.txt is not a file"),
        (["task=celebrity", "task.protocol=esd", "concept=Tom Cruise"], "realera or mace"),
        (["concept=[cat,../dog]"], "is a path"),
    ],
)
def test_the_command_refuses_with_one_sentence(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *words, "backbone=mini"])
    with pytest.raises(SystemExit) as left:
        import_module("realera.train").main()
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert said in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing half-written
