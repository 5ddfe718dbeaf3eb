"""Another judge's numbers with a correct checksum and invalid content; the mode and the known concepts of a judge."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from realera import evaluate
from realera.contracts import Prompt, UserError, Verdict
from realera.evaluation import results
from realera.evaluation.judge import judge_run
from realera.evaluation.records import ManifestEntry, read_metrics, verdict_file, write_manifest, write_verdicts
from realera.runs import steps
from realera.tasks.nsfw import NsfwTask
from realera.tasks.objects import ObjectTask


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """A run with one image per split, judged by "eye"."""
    prompts = [Prompt(split, "a photo", "cat", split, 0) for split in ("erase", "near", "keep")]  # type: ignore[arg-type]
    write_manifest(tmp_path, [ManifestEntry(prompt, f"images/{prompt.id}.png", "x") for prompt in prompts])
    write_verdicts(verdict_file(tmp_path, "eye"), [Verdict(prompt.id, 0.25, "dog") for prompt in prompts])
    results.measure(tmp_path, "eye", {"task": "object", "judge": {"judge": "eye"}})
    return tmp_path


FORGED: dict[str, Any] = {
    "no protocol": {"protocol": ...},
    "a text for a protocol": {"protocol": "x"},
    "a text for a judge": {"protocol": {"judge": "x"}},
    "a set without protocol": {"set": {"fid": 1.0}, "protocol": ...},
    "a list for a set": {"set": [1], "protocol": {}},
    "a mapping for a number": {"set": {"fid": {"a": 1}}, "protocol": {}},
    "a number for the original": {"original": 5},
    "no numbers of the original": {"original": {"main": []}},
    "a word for a value": {"main": {"acc_e": {"value": "x"}}},
    "a list for main": {"main": [1]},
    "infinity": {"set": {"fid": 1e999}, "protocol": {}},
    "an unknown term": {"h_o_terms": ["x"]},
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_numbers_are_left_out_with_one_warning(
    case: str, judged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (judged / "metrics.json").read_text()
    file = judged / "verdicts" / "evil.json"
    numbers = json.loads((judged / "verdicts" / "eye.json").read_text()) | FORGED[case]
    del numbers["checksum"]
    numbers = {key: value for key, value in numbers.items() if value is not ...}
    numbers["checksum"] = results._checksum(numbers)
    file.write_text(json.dumps(numbers))
    assert results.first_torn_file(judged) == file and results.numbers_of(judged, "evil") is None
    with caplog.at_level(logging.WARNING):
        results.write_metrics(judged, "eye")
    assert [str(file) in line for line in caplog.messages] == [True]
    assert (judged / "metrics.json").read_text() == before and not file.exists()
    assert read_metrics(judged)["judges"] == {} and results.first_torn_file(judged) is None


def test_an_honest_second_judge_stays(judged: Path) -> None:
    write_verdicts(verdict_file(judged, "ear"), [Verdict(name, 0.5, "dog") for name in ("erase", "near", "keep")])
    results.measure(judged, "ear", {"judge": {"judge": "ear"}}, own="eye")
    metrics = read_metrics(judged)
    assert list(metrics["judges"]) == ["ear"] and results.first_torn_file(judged) is None
    shown = evaluate.shown(metrics, Judge("ear"))
    assert shown["main"]["acc_e"]["value"] == 50 and shown["protocol"]["task"] == "object"


def test_a_judge_that_answers_out_of_order_is_refused(judged: Path) -> None:
    with pytest.raises(UserError, match="one verdict per image, in order"):
        judge_run(Judge("eye"), judged)


class Judge:
    def __init__(self, name: str, detects: bool = False) -> None:
        self.name, self.detects = name, detects

    def __call__(self, *_: Any) -> list[Verdict]:
        return []

    def protocol(self) -> dict[str, Any]:
        return {"judge": self.name}


class Knowing(Judge):
    def knows(self, concept: str) -> bool:
        return concept not in ("quokka", "cat", "deer")


def test_a_judge_that_only_detects_sets_the_mode_detected() -> None:
    task = ObjectTask("airplane")
    read, terms = steps.modes_and_terms(Judge("nudenet", detects=True), task)
    assert set(read) == set(task.headline) and set(read.values()) == {"detected"} and terms == ()
    assert steps.modes_and_terms(Judge("clip"), task) == (task.headline, task.h_o_terms)
    own = NsfwTask("nudity")
    assert steps.modes_and_terms(Judge("nudenet", detects=True), own) == (own.headline, own.h_o_terms)


def test_concepts_unknown_to_a_judge_are_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        steps.warn_unknown(Knowing("eye"), ObjectTask("airplane"))
        steps.warn_unknown(Judge("other"), ObjectTask("quokka", anchor="grass"))
        steps.warn_unknown(Knowing("eye"), NsfwTask("nudity"))  # read as detected and by its captions
    assert caplog.messages == ["the judge eye does not know 'cat', 'deer': images of them are not scored."]
