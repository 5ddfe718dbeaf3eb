"""The printed names of the metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from realera import console
from realera.contracts import Mode
from realera.evaluation.measures import MEAN_PROB, NEAR, near
from realera.evaluation.records import read_metrics
from realera.reporting.run_page import write_report
from realera.reporting.sweep.page import write_sweep
from realera.tasks.base import NamedTask
from realera.tasks.celebrities import CelebrityTask
from realera.tasks.nsfw import NsfwTask
from realera.tasks.objects import ObjectTask
from realera.tasks.styles import StyleTask
from sweeps import judged


@pytest.mark.parametrize(
    "task",
    [
        ObjectTask("cat"),
        NsfwTask(None, world="miniature"),
        CelebrityTask("Tom Cruise"),
        StyleTask("Van Gogh"),
    ],
    ids=lambda task: task.name,
)
def test_the_task_determines_the_word_for_the_split_near(task: NamedTask) -> None:
    texts = [prompt.text for prompt in task.prompts_of("near")]
    names = {name for entry in task.entries.values() for name in entry.get("synonyms", ())}
    of_names = all(any(name in text for name in names) for text in texts)
    assert texts and near(task.protocol()) == ("synonym" if of_names else "phrase")


def test_an_unknown_task_gets_a_neutral_word() -> None:
    assert near({}) == near({"task": "birds"}) == "paraphrase" and set(NEAR.values()) == {"synonym", "phrase"}


@pytest.mark.parametrize(("task", "word", "others"), [("object", "synonym", "phrase"), ("style", "phrase", "synonym")])
def test_pages_sheets_and_terminal_use_the_word(
    task: str, word: str, others: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    headline: dict[str, Mode] = dict(MEAN_PROB)
    run = judged(tmp_path / "a", task=task, headline=headline, pictures=True)
    page = write_report(run).read_text(encoding="utf-8")
    assert f"Prompted by {word}" in page and f"prompted by {word}, " in page and f"{word}s" in page
    assert f"by {others}" not in page
    of_all = write_sweep([run, judged(tmp_path / "b", method="uce", task=task, pictures=True)], tmp_path / "all.html")
    text = of_all.read_text(encoding="utf-8")
    assert f"<small>{word}</small>" in text and f"<small>{others}</small>" not in text
    console.show_run(run, read_metrics(run), "a run")
    assert f"{word}s" in (said := capsys.readouterr().out) and f"{others}s" not in said
