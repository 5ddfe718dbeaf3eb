"""Building a judge from its settings, and judging again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from realera.contracts import Prompt, UserError, Verdict
from realera.judges.other_interpreter import RemoteJudge
from realera.runs import steps
from realera.tasks.objects import ObjectTask


class Chooser:
    """A judge that keeps its labels."""

    name = "chooser"

    def __init__(self, labels: Sequence[str] | None = None) -> None:
        self.labels = labels

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        return [Verdict(prompt.id, 0.5, "x") for prompt in prompts]

    def protocol(self) -> dict[str, Any]:
        return {"judge": self.name}


class Comparer:
    """A judge of whole sets."""

    name = "comparer"

    def compare(self, images: Sequence[Path], references: Sequence[Path]) -> dict[str, float]:
        return {"distance": float(len(images))}

    def protocol(self) -> dict[str, Any]:
        return {"judge": self.name}


TASK = ObjectTask("airplane")
CHOOSER, COMPARER = f"{__name__}.Chooser", f"{__name__}.Comparer"


def test_a_judge_without_labels_gets_those_of_the_task() -> None:
    one = steps.build_judge({"judge": {"_target_": CHOOSER, "labels": None}}, TASK)
    assert list(one.labels) == list(TASK.labels)  # type: ignore[attr-defined]
    given = steps.build_judge({"judge": {"_target_": CHOOSER, "labels": ["a"]}}, TASK)
    assert list(given.labels) == ["a"]  # type: ignore[attr-defined]


def test_a_judge_without_anchors_gets_those_of_the_task() -> None:
    node = {"_target_": "realera.judges.miniature.MiniatureJudge", "anchors": None}
    judge = steps.build_judge({"judge": node}, TASK)
    assert judge.anchors == {c.target: c.anchor for c in TASK.concepts}  # type: ignore[attr-defined]
    assert steps.build_judge({"judge": {**node, "anchors": {}}}, TASK).anchors == {}  # type: ignore[attr-defined]


def test_labels_reach_the_judges_inside_a_judge() -> None:
    parts = {"eye": {"_target_": CHOOSER, "labels": None}, "ear": {"_target_": CHOOSER, "labels": []}}
    node = {"_target_": "realera.judges.by_split.BySplit", "judges": parts, "splits": {"erase": "eye", "keep": "ear"}}
    built: Any = steps.build_judge({"judge": node}, TASK)
    assert list(built.judges["eye"].labels) == list(TASK.labels) and list(built.judges["ear"].labels) == []


def test_a_judge_of_sets_can_compare_but_not_judge_a_run() -> None:
    config = {"judge": {"_target_": COMPARER, "references": None, "split": "keep"}}
    with pytest.raises(UserError, match="judge=comparer compares whole sets"):
        steps.build_judge(config, TASK)
    assert isinstance(steps.any_judge(config, TASK), Comparer)


def test_python_names_the_interpreter_a_judge_runs_in() -> None:
    node = {"_target_": "realera.judges.by_split.BySplit", "judges": {}, "splits": {}, "python": sys.executable}
    built = steps.build_judge({"judge": node}, TASK)
    assert isinstance(built, RemoteJudge) and built.protocol()["splits"] == {}
    built.close()
    here = steps.build_judge({"judge": {**node, "python": None}}, TASK)
    assert not isinstance(here, RemoteJudge)
