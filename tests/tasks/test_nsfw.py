"""Unsafe content: the miniature's harmless drawings, and tables of prompts with seeds, guidance and sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import realera
from realera.contracts import Concept, UserError
from realera.setting_types import MOST_GUIDANCE
from realera.tasks.base import load
from realera.tasks.nsfw import CAPTION_CONCEPT, NsfwTask

WORLD: dict[str, Any] = yaml.safe_load(
    (Path(realera.__file__).parent / "miniature" / "world.yaml").read_text(encoding="utf-8")
)


@pytest.fixture
def i2p(tmp_path: Path) -> str:
    path = tmp_path / "i2p.csv"
    path.write_text(
        "prompt,nudity_percentage,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,concept\n"
        "a statue,0,11,7,512,512,\na swimmer,20,12,9.5,384,512,violence\na boxer,60,13,7,512,256,nudity\n",
        encoding="utf-8",
    )
    return str(path)


def test_the_miniatures_words_are_those_of_its_world() -> None:
    held = load("nsfw.yaml")["worlds"]["miniature"]
    assert held["unnamed"] == list(held["concepts"]) == list(WORLD["unsafe"])
    assert held["preserved"] == list(WORLD["everyday"])
    for name, entry in held["concepts"].items():
        assert entry["anchor"] in WORLD["scenes"]
        for key in ("synonyms", "associated", "unseen"):
            assert entry[key] == WORLD["unsafe"][name][key], (name, key)
    assert held["training_templates"] == load("objects.yaml")["training_templates"]


def test_the_miniatures_five_are_erased_together() -> None:
    task = NsfwTask(world="miniature")
    prompts = task.eval_prompts()
    assert len(task.concepts) == 5
    assert Counter(p.split for p in prompts) == {"erase": 60, "near": 60, "keep": 102, "associated": 45, "unseen": 40}
    assert len({p.id for p in prompts}) == len(prompts)
    assert task.headline["acc_e"] == "detected" and task.headline["acc_s"] == "mean_prob" and task.h_o_terms == ()
    assert task.labels == (*WORLD["unsafe"], *WORLD["everyday"])
    one = NsfwTask("Gun", world="miniature")
    assert one.concepts == [Concept("gun", "street")]
    assert {p.concept for p in one.eval_prompts() if p.split != "keep"} == {"gun"}


def test_nudity_is_the_papers_concept_and_mace_erases_four_words() -> None:
    assert NsfwTask().concepts == [Concept("nudity", "a person wearing clothes")]
    mace = NsfwTask(protocol="mace")
    assert [c.target for c in mace.concepts] == ["nudity", "naked", "erotic", "sexual"]
    assert {c.anchor for c in mace.concepts} == {"a person wearing clothes"}
    assert {p.guidance_scale for p in mace.eval_prompts()} == {7.5}
    assert NsfwTask(concepts=[]).concepts == NsfwTask().concepts


def test_every_row_keeps_its_own_seed_guidance_and_size(i2p: str) -> None:
    task = NsfwTask(prompts_csv=i2p)
    rows = [p for p in task.eval_prompts() if p.split == "erase"]
    assert [(p.seed, p.guidance_scale, p.size) for p in rows] == [
        (11, 7.0, (512, 512)),
        (12, 9.5, (512, 384)),
        (13, 7.0, (256, 512)),
    ]
    assert {p.concept for p in rows} == {"nudity"}
    fixed = NsfwTask(prompts_csv=i2p, fixed_guidance=7.5, min_nudity=0, limit=1)
    rows = [p for p in fixed.eval_prompts() if p.split == "erase"]
    assert [(p.text, p.guidance_scale) for p in rows] == [("a swimmer", 7.5)]


def test_mace_draws_all_rows_with_the_same_settings(i2p: str) -> None:
    def sizes(**settings: Any) -> set[Any]:
        return {p.size for p in NsfwTask(prompts_csv=i2p, **settings).eval_prompts() if p.split == "erase"}

    assert sizes(protocol="mace") == sizes(row_sizes=False) == {None}
    assert sizes(protocol="mace", row_sizes=True) == sizes() == {(512, 512), (512, 384), (256, 512)}
    assert NsfwTask(protocol="mace").protocol()["row_sizes"] is False


def test_preserved_captions_are_compared_with_their_own_text(tmp_path: Path) -> None:
    path = tmp_path / "coco.csv"
    path.write_text("caption\nA dog.\nA cat.\nA cow.\n", encoding="utf-8")
    task = NsfwTask(keep_csv=str(path), keep_limit=2, first_seed=40)
    kept = [p for p in task.eval_prompts() if p.split == "keep"]
    assert [(p.text, p.caption, p.concept, p.seed) for p in kept] == [
        ("A dog.", None, CAPTION_CONCEPT, 40),
        ("A cat.", None, CAPTION_CONCEPT, 41),
    ]
    assert task.headline["acc_s"] == "score"
    assert NsfwTask(world="miniature", keep_csv=str(path)).headline["acc_s"] == "score"


def test_setting_and_table_allow_the_same_guidance(tmp_path: Path) -> None:
    """The setting and the table's column have the same bound."""
    path = tmp_path / "i2p.csv"
    path.write_text(f"prompt,guidance\na statue,{MOST_GUIDANCE}\n", encoding="utf-8")
    assert NsfwTask(prompts_csv=str(path)).prompts_of("erase")[0].guidance_scale == MOST_GUIDANCE
    assert NsfwTask(fixed_guidance=MOST_GUIDANCE).fixed_guidance == MOST_GUIDANCE
    with pytest.raises(UserError, match=r"task\.fixed_guidance=1001 is not a number from 0 to 1000"):
        NsfwTask(fixed_guidance=MOST_GUIDANCE + 1)


def test_a_row_may_name_its_concept(i2p: str) -> None:
    task = NsfwTask(["violence", "nudity"], anchor=["peace", None], prompts_csv=i2p)
    assert [p.concept for p in task.eval_prompts() if p.split == "erase"] == ["violence", "violence", "nudity"]


def test_the_sample_is_used_and_logged_without_a_csv(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logger = logging.getLogger("realera")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level("INFO", "realera"):
            task = NsfwTask()
    finally:
        logger.removeHandler(caplog.handler)
    assert "task.prompts_csv=FILE is not given" in caplog.text and "task.keep_csv" in caplog.text
    assert Counter(p.split for p in task.eval_prompts()) == {"erase": 12, "keep": 12}


def test_the_protocol_names_the_files_content(i2p: str) -> None:
    first = NsfwTask(prompts_csv=i2p, limit=2).protocol()
    assert first["prompts"]["erase"]["rows"] == 2 and first["prompts"]["erase"]["file"] == "i2p.csv"
    assert first["images_per_prompt"]["erase"] == 1 and first["fixed_guidance"] is None
    Path(i2p).write_text("prompt\nanother\n", encoding="utf-8")
    again = NsfwTask(prompts_csv=i2p).protocol()
    assert again["prompts"]["erase"]["sha256"] != first["prompts"]["erase"]["sha256"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"concepts": "violence"}, "anchor='a person wearing clothes'"),
        ({"concepts": "apple", "world": "miniature"}, "(gun, knife, bomb, cigarette, syringe)"),
        ({"concepts": "pistol", "world": "miniature"}, "concept=gun"),
        ({"concepts": "gun", "world": "miniature", "anchor": "firearm"}, "another"),
        ({"prompts_csv": "nowhere.csv"}, "nowhere.csv cannot be read"),
        ({"limit": 0}, "task.limit=0"),
        ({"keep_limit": 1.5}, "task.keep_limit=1.5"),
        ({"fixed_guidance": "high"}, "task.fixed_guidance=high"),
        ({"min_nudity": -1}, "task.min_nudity=-1"),
        ({"protocol": "sld"}, "realera or mace"),
        ({"world": "moon"}, "paper or miniature"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        NsfwTask(**arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
