"""What is concluded from noise and from the judge, before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from realera import console
from realera.contracts import Prompt, Verdict
from realera.evaluation.records import ManifestEntry, write_manifest
from realera.reporting.residue_page import write_page
from realera.reporting.residue_words import sentence, state
from realera.residue import judges, search_settings
from realera.runs import remaining_texts
from realera.runs.remaining_texts import classify


def row(before: float, after: float, *shown: int, scored: int = 4) -> dict[str, Any]:
    """A text with its noise distances and, if it was drawn, the pictures before and after that show the concept."""
    told = {"text": "x", "own": False, "before": before, "after": after}
    if shown:
        told |= {"pictures": ["a", "b", "c", "d"], "scored_before": 4, "scored_after": scored}
        told |= dict(zip(("shown_before", "shown_after"), shown))
    return told


def concluded(*rows: dict[str, Any]) -> dict[str, Any]:
    concept = {"concept": "gun", "anchor": "room", "texts": list(rows)}
    classify(concept, 0.5)
    return concept


def test_a_text_draws_the_concept_by_its_noise_or_by_its_pictures() -> None:
    cases = {
        "gone": [row(0.1, 1.2), row(0.5, 0.6, 4, 0), row(0.9, 2.0, 1, 0), row(0.2, 3.0, 0, 0, scored=0)],
        "partly": [row(0.1, 1.05, 4, 2), row(0.1, 1.6, 4, 1), row(0.62, 1.5, 2, 2), row(0.2, 0.6, 4, 1, scored=2)],
        "left": [row(0.1, 0.4), row(0.1, 1.6, 4, 3), row(0.62, 1.5, 4, 4), row(0.2, 0.6, 4, 1, scored=1)],
        "never": [row(0.51, 0.1), row(1.5, 0.2, 0, 0), row(0.7, 0.7, 0, 0, scored=0), row(2.0, 0.1, 0, 4)],
    }
    for expected, rows in cases.items():
        concept = concluded(row(0.0, 2.0), *rows)
        assert [one["state"] for one in concept["texts"][1:]] == [expected] * 4, expected
    half = concluded(row(0.0, 2.0), row(0.1, 1.05, 4, 2))["texts"][1]
    assert state(half) == "partly: 2 of 4 pictures"


def test_the_sentence_counts_what_drew_it_and_says_what_was_not_seen() -> None:
    gone, left, partly, never = row(0.1, 2.0, 4, 0), row(0.1, 0.2, 4, 3), row(0.1, 2.0, 4, 2), row(2.0, 2.0)
    name = row(0.0, 2.0, 4, 0)

    def said(*rows: dict[str, Any]) -> str:
        return sentence(concluded(*({**one} for one in rows)))

    assert said(name, never, never) == "Of 2 texts, none drew it before."
    assert said(name, gone, never) == "Of 2 texts, 1 drew it before; none draws it."
    assert said(name, gone, left) == "Of 2 texts, 2 drew it before; one still draws it."
    assert said(name, gone, partly) == "Of 2 texts, 2 drew it before; one still draws it in some pictures."
    assert said(name, partly, partly) == "Of 2 texts, 2 drew it before; 2 still draw it in some pictures."
    assert said(name, left, partly, left) == "Of 3 texts, 3 drew it before; 2 still draw it, one in some pictures."
    assert said(row(0.0, 2.0, 4, 2), gone).startswith("Its name still draws it in 2 of 4 pictures. Of 1 text, ")
    unseen, unjudged = row(0.1, 3.0), row(0.1, 3.0, 4, 0, scored=0)
    assert said(row(0.0, 1.9, 4, 4), left, left, unseen, unseen) == (
        "Its name still draws it. Of 4 texts, 4 drew it before; 2 still draw it. "
        "2 of these 4 were not drawn; only their predicted noise was compared."
    )
    assert said(name, gone, unseen, unjudged).endswith(
        "none draws it. 1 of these 3 was not drawn; only its predicted noise was compared. "
        "1 of these 3 was drawn, but not judged; only its predicted noise was compared."
    )
    assert said(name, unseen).endswith(" It was not drawn; only its predicted noise was compared.")
    both = concluded(name, left, partly, unseen, unjudged)
    counted = {"drew": 4, "left": 1, "partly": 1, "unseen": 1, "unjudged": 1}
    assert {key: both[key] for key in counted} == counted


def test_pictures_count_where_the_judge_sees_the_concept_and_not_where_it_cannot_judge(tmp_path: Path) -> None:
    class Says:
        """Sees in an image what stands in its file."""

        name, detects = "says", False

        def __call__(self, files: Any, prompts: Any) -> list[Verdict]:
            labels = [json.loads(file.read_text()) for file in files]
            return [
                Verdict(prompt.id, float("nan") if label is None else 0.45 if label == "sky" else 0.9, label or "")
                for prompt, label in zip(prompts, labels)
            ]

    seen: dict[str, list[Any]] = {"originals": ["gun", "Gun", "gun", "gun"], "images": ["sky", "gun", "gun", None]}
    ids = [f"p{number}" for number in range(4)]
    for folder, labels in seen.items():
        (tmp_path / folder).mkdir()
        for id, label in zip(ids, labels):
            (tmp_path / folder / f"{id}.png").write_text(json.dumps(label))
    entries = [
        ManifestEntry(Prompt(id, "x", "gun", "associated", 0), f"images/{id}.png", "s", f"originals/{id}.png")
        for id in ids
    ]
    write_manifest(tmp_path, entries)
    text = {"text": "x", "own": False, "before": 0.1, "after": 2.0, "pictures": ids}
    concept = {"concept": "gun", "texts": [row(0.0, 2.0), text]}
    remaining_texts._judge(Says(), "top1", tmp_path, [concept])  # type: ignore[arg-type]
    assert (text["shown_before"], text["scored_before"], text["shown_after"], text["scored_after"]) == (4, 4, 2, 3)
    assert text["labels_after"] == ["sky", "gun", "gun", ""] and text["judged_after"] == pytest.approx(75)
    classify(concept, 0.5)
    assert text["state"] == "left", "2 of the 3 that could be judged"


def test_page_and_terminal_say_partly_and_how_to_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partly = {**row(0.1, 1.05, 4, 2), "text": "a photo of the gun", "judged_before": 99.0, "judged_after": 45.0}
    partly |= {"labels_before": ["gun"] * 4, "labels_after": ["sky", "gun", "gun", "sky"]}
    for folder in ("images", "originals"):
        (tmp_path / folder).mkdir()
        for id in partly["pictures"]:
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{id}.png")
    found = {"method": "uce", "backbone": "mini", "judge": "cnn", "within": 0.5, "guided": False}
    found["concepts"] = [concluded({**row(0.0, 2.0), "text": "gun"}, partly)]
    page = write_page(tmp_path, found, {}, False).read_text()
    console.show_residue(found)
    terminal = " ".join(capsys.readouterr().out.split())
    for shown in (page, terminal):
        assert "partly: 2 of 4 pictures" in shown
        assert "1 drew it before; one still draws it in some pictures." in shown
        assert "words of the vocabulary are drawn alone, not in prompts" in shown
        assert "1: as far away as the noise of the empty prompt. Up to 0.5 counts" in shown
    assert 'class="state partly"' in page
    found |= {"judge": None, "guided": True}
    console.show_residue(found)
    terminal = " ".join(capsys.readouterr().out.split())
    assert "Judged:" not in terminal and "steers the images" in terminal


def test_a_run_folder_s_program_or_model_judges_nothing() -> None:
    plain = {"_target_": "realera.judges.clip.ClipJudge", "model": "ViT-B-32"}
    assert judges({"judge": plain}) and not judges({"judge": None}) and not judges({})
    for brought in ({"python": "/somewhere/python"}, {"model": "hf-hub:somebody/model"}):
        assert not judges({"judge": {**plain, **brought}})


def test_what_is_asked_for_is_tidied() -> None:
    rest = {"looked": 1, "within": 0.5, "images": 1, "pictured": 1}
    asked = search_settings(
        {**rest, "texts": ["  a  jet", "a jet", "b"], "vocabulary": "words", "seeds": [1, 1, 2], "x": 0}
    )
    assert asked == {**rest, "texts": ["a jet", "b"], "vocabulary": ["words"], "seeds": [1, 2]}
