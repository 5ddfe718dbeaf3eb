"""Every leaf of every yaml with fifteen odd values: accepted, or refused with one sentence; never a traceback."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import walk
from quick import slow_unless
from realera.contracts import UserError
from realera.judges.other_interpreter import with_interpreters
from realera.paths import CONF_DIR
from realera.runs import preflight
from realera.settings import composition, schema
from realera.settings.instantiate import build
from realera.settings.run_settings import AttackSettings, BackboneSettings

ALL = [("", door) for door in walk.DOORS] + walk.options()
FIGURES: Counter[str] = Counter()
MINIATURE = "realera.judges.miniature.MiniatureJudge"


@pytest.fixture(scope="module", autouse=True)
def figures(request: pytest.FixtureRequest) -> Any:
    """Prints how many settings were tried in this process."""
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(
            f"\nevery setting: {FIGURES['leaves']} leaves, {FIGURES['refused'] + FIGURES['accepted']} values, "
            f"{FIGURES['refused']} refused, {FIGURES['accepted']} accepted, {FIGURES['built']} built"
        )
    if FIGURES["files"] == len(ALL):
        assert FIGURES["leaves"] > 500 and FIGURES["refused"] > 5000
        assert FIGURES["accepted"] > 700 and FIGURES["built"] > 500


def tried(door: str, config: dict[str, Any], place: walk.Place) -> str | None:
    """The sentence that refuses the settings; None if they are accepted. Parts that are cheap to build are built."""
    try:
        schema.check(config, door)
        if door == "attack" and place[0] == "attack":
            build(AttackSettings(config["attack"]).to_build)
            FIGURES["built"] += 1
        if door == "train":
            preflight.check_settings(config)
            if place[0] in ("task", "concept", "anchor"):
                task = composition.build_task(config)
                assert task.eval_prompts() and composition.name_concepts(config, task)["concept"]
            elif place[0] == "method":
                build(config["method"])
            elif place[:2] == ("backbone", "pretrained"):
                preflight.check_model(BackboneSettings(config["backbone"]), plan=True)
            elif place[0] == "judge" and (config["judge"] or {}).get("_target_") == MINIATURE:
                build(with_interpreters(config["judge"]))
            else:
                return None
            FIGURES["built"] += 1
    except UserError as error:
        return str(error)
    return None


def is_one_sentence(said: str) -> bool:
    return bool(said) and "\n" not in said and "Error" not in said and "object" not in said.split("_target_")[0][:20]


@pytest.mark.quick(5)
@pytest.mark.parametrize(("group", "option"), slow_unless(ALL, *ALL[::6]), ids=lambda value: str(value) or "door")
def test_every_leaf_accepts_or_refuses_odd_values(group: str, option: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    door, config, places = walk.walked(group, option)
    assert tried(door, config, ("method",)) is None, "the yaml's own values pass"
    assert places
    FIGURES["files"] += 1
    for place in places:
        FIGURES["leaves"] += 1
        for value in walk.ODD:
            said = tried(door, walk.with_value(config, place, value), place)
            FIGURES["accepted" if said is None else "refused"] += 1
            assert said is None or is_one_sentence(said), (place, value, said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("group", "option"), slow_unless(ALL, *ALL[::25]), ids=lambda value: str(value) or "door")
def test_a_plain_value_in_place_of_settings_is_refused(group: str, option: str) -> None:
    """method.edit=5, task.images=[], ..., and a missing group."""
    door, config, _ = walk.walked(group, option)
    for place in walk.groups_of(config):
        for value in (5, "abc", True, [1], ""):
            with pytest.raises(UserError):
                schema.check(walk.with_value(config, place, value), door)
    for key in config:
        if key != "judge":
            with pytest.raises(UserError, match=f"{key} is missing"):
                schema.check({name: one for name, one in config.items() if name != key}, door)
    with pytest.raises(UserError, match="there is no setting 'new'"):
        schema.check({**config, "new": 1}, door)


def test_the_search_and_the_sweeps_parameters() -> None:
    sweeper = walk.own_yaml(CONF_DIR / "hydra" / "sweeper" / "search.yaml")
    schema.check_search({**sweeper, "storage": "sqlite:///x.db"})
    for place in walk.leaves(sweeper):
        if place[0] in ("_target_", "sampler"):  # Optuna's own
            continue
        FIGURES["leaves"] += 1
        for value in walk.ODD:
            try:
                schema.check_search(walk.with_value(sweeper, place, value))
                FIGURES["accepted"] += 1
            except UserError as error:
                FIGURES["refused"] += 1
                assert is_one_sentence(str(error))
    for file in sorted((CONF_DIR / "experiment").glob("*.yaml")):
        params = OmegaConf.to_container(OmegaConf.load(file), resolve=False).get("hydra", {})  # type: ignore[union-attr]
        for key in (params.get("sweeper") or {}).get("params", {}):
            FIGURES["leaves"] += 1
            for value in (None, [], {"a": 1}, ""):
                with pytest.raises(UserError, match=rf"hydra\.sweeper\.params\.{key}="):
                    schema.check_search({"params": {key: value}})
                FIGURES["refused"] += 1


@pytest.mark.parametrize("door", ["train", "evaluate"])
def test_a_wrong_setting_is_named_even_if_others_are_resolved_from_it(door: str) -> None:
    """If a resolver fails because of a setting, the sentence names that setting."""
    for key, value in (("seed", "abc"), ("concept", 1.5), ("backbone.name", None), ("task._target_", "abc")):
        cfg = walk.composed(door)
        cfg.task.first_seed = "${times:1000,${seed}}"
        OmegaConf.update(cfg, key, value)
        with pytest.raises(UserError, match=rf"^{key}="):
            composition.checked(cfg, door)


@pytest.mark.slow
def test_typed_odd_values_are_checked_like_set_ones(tmp_path: Path, monkeypatch: Any) -> None:
    """Tries a sample of the values by composing them with Hydra, with all interpolations."""
    monkeypatch.chdir(tmp_path)
    cfg = walk.composed("train", "experiment=table1", "method=ac")
    draw = random.Random(0)
    places = [place for place in walk.leaves(composition.plain(cfg)) if all(isinstance(key, str) for key in place)]
    for place in draw.sample(places, 40):
        value = draw.choice(walk.ODD)
        with_it = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
        OmegaConf.update(with_it, ".".join(map(str, place)), value, merge=False)
        try:
            composition.checked(with_it, "train")  # type: ignore[arg-type]
        except UserError as error:
            assert is_one_sentence(str(error)), (place, value)
    assert not list(tmp_path.iterdir())
