"""The prompts of the demo's gallery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from realera.contracts import UserError
from realera.runs import presets
from realera.runs.folders import Run
from realera.tasks.objects import ObjectTask

TASK = {"_target_": "realera.tasks.objects.ObjectTask", "_convert_": "all", "concepts": "airplane"}


def run_in(folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(folder, {"task": TASK, "concept": "airplane"})


def add_residue(run: Run, name: str, texts: dict[str, str]) -> None:
    place = run.folder / "residue" / name
    place.mkdir(parents=True)
    rows = [{"text": text, "state": state} for text, state in texts.items()]
    (place / "residue.json").write_text(json.dumps({"concepts": [{"texts": rows}]}))


def test_every_prompt_of_the_task_stands_under_its_split(tmp_path: Path) -> None:
    found = presets.presets_of([run_in(tmp_path)])
    task = ObjectTask("airplane")
    assert list(found) == list(presets.HEADINGS.values())
    for split, heading in presets.HEADINGS.items():
        expected = dict.fromkeys(prompt.text for prompt in task.eval_prompts() if prompt.split == split)
        assert found[heading] == list(expected)[: presets.MOST] and found[heading]


def test_residue_is_sorted_by_whether_it_is_left_in_any_run(tmp_path: Path) -> None:
    first, second = run_in(tmp_path / "a"), run_in(tmp_path / "b")
    add_residue(first, "1", {"jetliner": "gone", "boeing": "gone", "a cat": "never"})
    add_residue(second, "1", {"jetliner": "left", "a photo of the aircraft": "left"})
    add_residue(second, "2", {"a jet": "partly"})
    found = presets.presets_of([first, second])
    assert found[presets.LEFT] == ["jetliner", "a photo of the aircraft", "a jet"] and found[presets.GONE] == ["boeing"]
    assert "a photo of the aircraft" not in found["Other names"], "each text once"


@pytest.mark.parametrize("content", ["{", "[]", '{"concepts": [{"texts": [{"text": 1, "state": "left"}]}]}'])
def test_a_residue_file_that_cannot_be_read_is_skipped(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets.log, "propagate", True)
    run = run_in(tmp_path)
    add_residue(run, "1", {})
    (tmp_path / "residue/1/residue.json").write_text(content)
    assert presets.LEFT not in presets.presets_of([run])
    assert "its texts are not shown" in caplog.text


def test_a_residue_file_outside_of_the_run_is_refused(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    elsewhere = run_in(tmp_path / "elsewhere")
    add_residue(elsewhere, "1", {"secret": "left"})
    (run.folder / "residue/1").mkdir(parents=True)
    (run.folder / "residue/1/residue.json").symlink_to(elsewhere.folder / "residue/1/residue.json")
    with pytest.raises(UserError, match="symbolic link"):
        presets.presets_of([run])


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = {"Mine": ["a café", 'a "b" <c>'], "Others": ["x"]}
    file = tmp_path / "p.json"
    file.write_text(presets.text_of(given), encoding="utf-8")
    assert presets.read(file) == given
    file.write_text(json.dumps({"Mine": [" ", "a"], "": ["b"], "Empty": []}))
    assert presets.read(file) == {"Mine": ["a"]}


@pytest.mark.parametrize("content", ["", "[1]", '{"a": "b"}', '{"a": [1]}', "NaN"])
def test_a_file_of_another_form_is_refused(content: Any, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(content)
    with pytest.raises(UserError, match="give a JSON object of headings"):
        presets.read(file)
