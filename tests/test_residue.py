"""What is concluded from noise and from the judge, before and after."""

from __future__ import annotations

from typing import Any

from realera.reporting.residue_words import sentence
from realera.residue import judges, search_settings
from realera.runs.remaining_texts import classify


def row(before: float, after: float, *judged: float | None) -> dict[str, Any]:
    said = dict(zip(("judged_before", "judged_after"), judged))
    return {"text": "x", "before": before, "after": after, **said}


def concluded(*rows: dict[str, Any]) -> dict[str, Any]:
    concept = {"concept": "gun", "texts": list(rows)}
    classify(concept, 0.5)
    return concept


def test_a_text_draws_the_concept_by_its_noise_or_by_its_pictures() -> None:
    cases = {
        "gone": [row(0.1, 1.2), row(0.5, 0.6, 95, 49), row(0.9, 2.0, 80, 0), row(0.2, 3.0, None, None)],
        "left": [row(0.1, 0.4), row(0.1, 1.6, 96, 66), row(0.62, 1.5, 83, 87), row(0.3, 0.2, 90, 3)],
        "never": [row(0.51, 0.1), row(1.5, 0.2, 10, 3), row(0.7, 0.7, None, None), row(2.0, 0.1, 49, 99)],
    }
    for state, rows in cases.items():
        concept = concluded(row(0.0, 2.0), *rows)
        assert [one["state"] for one in concept["texts"][1:]] == [state] * 4, state


def test_the_sentence_counts_what_drew_it_and_says_what_was_not_seen() -> None:
    gone, left, never = row(0.1, 2.0, 90, 1), row(0.1, 0.2, 90, 80), row(2.0, 2.0)
    name, named = row(0.0, 2.0, 99, 0), row(0.0, 1.9, 98, 93)
    assert sentence(concluded(name, never, never)) == "Of 2 texts, none drew it before."
    assert sentence(concluded(name, gone, never)) == "Of 2 texts, 1 drew it before; none draws it."
    assert sentence(concluded(name, gone, left)) == "Of 2 texts, 2 drew it before; one still draws it."
    both = concluded(named, left, left, row(0.1, 3.0), row(0.2, 3.0))
    assert sentence(both) == (
        "Its name still draws it. Of 4 texts, 4 drew it before; 2 still draw it. "
        "2 of these were classified by noise alone."
    )
    assert (both["drew"], both["left"], both["unseen"], both["name_left"]) == (4, 2, 2, True)


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
