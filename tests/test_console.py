"""The table a run ends with, in a terminal of 80 columns."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from realera import console, train
from realera.contracts import Mode, Prompt, Split, Verdict
from realera.evaluation.measures import MEAN_PROB
from realera.evaluation.metrics import summarise
from realera.runs import folders
from realera.training.callbacks import FitProgress
from sweeps import judged as judged_run

METHODS = Path(console.__file__).parent / "methods"


def shown(metrics: Mapping[str, Any]) -> str:
    plain = Console(width=80, force_terminal=False)
    with plain.capture() as capture:
        plain.print(console.results(metrics, "a run"))
    return capture.get()


def judged(headline: Mapping[str, Mode], terms: tuple[str, ...], concepts: int = 1) -> dict[str, Any]:
    """One in four images by name is unscored after erasing; every interval is as wide as it can be."""
    splits: list[tuple[Split, str]] = [("erase", f"concept {i}") for i in range(concepts)]
    splits += [("near", "concept 0"), ("keep", "other")]
    prompts = [Prompt(f"{s}-{c}-{i}", "t", c, s, i) for s, c in splits for i in range(4)]
    after = []
    for p in prompts:
        lost = p.split == "erase" and p.seed == 0
        detail = {} if lost else {"score": 22.5 + p.seed % 2, "detected": p.seed % 2 == 0}
        after.append(Verdict(p.id, math.nan if lost else 1.0, p.concept, detail))
    before = [Verdict(p.id, 1.0, p.concept, {"score": 31.0, "detected": True}) for p in prompts]
    return summarise(prompts, after, before, headline=headline, terms=terms)


def test_accuracies_with_what_could_be_scored() -> None:
    text = shown(judged(dict.fromkeys(MEAN_PROB, "top1"), ("acc_e", "acc_s", "acc_g")))
    assert "Acc_e ↓ by name" in text and "H_o ↑" in text and "%" in text and "top-1; 95% intervals" in text
    assert "3/4" in text and "100.0 [39.8, 100.0]" in text and "…" not in text
    whole = shown(judged(MEAN_PROB, ("acc_e", "acc_s", "acc_g")))
    assert "100.0 [100.0, 100.0]" in whole and "…" not in whole
    assert "Acc_e 100 → 75" in text.replace("\n", " ") and "Acc_u" not in text


def test_scores_have_their_name_and_no_percent() -> None:
    text = shown(judged(dict.fromkeys(MEAN_PROB, "score"), ("acc_e", "acc_s", "acc_g")))
    assert "CLIP_e ↓" in text and "CLIP score; 95%" in text and "│ %" not in text and "┃ %" not in text


def test_detections_beside_a_score_and_no_h_o() -> None:
    headline: dict[str, Mode] = {**dict.fromkeys(MEAN_PROB, "detected"), "acc_s": "score"}
    text = shown(judged(headline, ()))
    assert "Det_e" in text and "CLIP_s ↑" in text and "H_o" not in text
    assert "Det: images with a detection, %; CLIP: CLIP score" in text.replace("\n", " ")


def test_several_concepts_are_listed_up_to_a_number() -> None:
    text = shown(judged(MEAN_PROB, ("acc_e", "acc_s"), concepts=15))
    assert "concept 0 " in text and "concept 11" in text and "concept 12" not in text
    assert "and 3 more in metrics.json" in text


def test_markup_in_a_concept_is_printed_as_it_is() -> None:
    metrics = judged(MEAN_PROB, ("acc_e", "acc_s"), concepts=2)
    metrics["concepts"] = {"[red]x[/red]": metrics["concepts"]["concept 0"]}
    assert "[red]x[/red]" in shown(metrics)


def test_a_plan_whose_jobs_are_all_refused_has_the_reasons_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "console", Console(width=80, file=screen, force_terminal=False))
    console.show_plan({"cells": 2, "refused": 2, "refusals": {"no prompts": 2}, "attacks": [], "basis": ""})
    assert screen.getvalue() == "planned: nothing, because all jobs are refused\nrefused (2): no prompts\n"


HOSTILE = "cat[/b] [red]x[/red] \x1b]0;owned\x07\nhttps://evil\x9b2J \u202egnp"
SAID = r"cat[/b] [red]x[/red] \x1b]0;owned\x07\x0ahttps://evil\x9b2J \u202egnp"


def test_texts_of_settings_and_files_are_shown_as_one_plain_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever one is shown: markup and control characters reach no terminal, and our own line breaks stay."""
    screen = io.StringIO()
    monkeypatch.setattr(console, "console", Console(width=400, file=screen, force_terminal=False))
    metrics = judged(dict.fromkeys(MEAN_PROB, "top1"), ("acc_e", "acc_s"), concepts=2)
    metrics["concepts"] = {HOSTILE: metrics["concepts"]["concept 0"]}
    metrics["main"][f"acc_{HOSTILE}"] = metrics["main"]["acc_e"]
    metrics["sets"] = {HOSTILE: {HOSTILE: 1.0}}
    monkeypatch.setattr(console.costs, "read", lambda folder: {})
    monkeypatch.setattr(console.cost_words, "sentence", lambda record: HOSTILE)
    console.show_run(tmp_path, metrics, HOSTILE)
    cell = {"state": "refused", "reason": HOSTILE, "overrides": [HOSTILE]}
    console.show_cells([cell])
    numbers = dict.fromkeys(("images", "original_images", "judged", "train_steps", "finished", "refused"), 1)
    console.show_plan(
        {**numbers, "cells": 2, "hours": None, "basis": HOSTILE, "refusals": {HOSTILE: 1}, "hindrances": [HOSTILE]}
    )
    console.show_path(HOSTILE, HOSTILE)
    with console.bar(HOSTILE, 1) as advance:
        advance(1)
    said = screen.getvalue()
    assert said.count(SAID) == 13, said
    assert len(said.splitlines()) > 20
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said)


def test_a_training_s_bar_takes_its_words_as_plain_text() -> None:
    progress = FitProgress(f"Aligning noise ({HOSTILE})")
    progress.on_train_start(SimpleNamespace(is_global_zero=True, max_steps=2, global_step=0), None)  # type: ignore[arg-type]
    assert progress.bar is not None
    screen = Console(width=200, file=io.StringIO(), force_terminal=False)
    with screen.capture() as capture:
        screen.print(progress.bar.get_renderable())
    progress._stop()
    assert SAID in capture.get()


@pytest.mark.parametrize("file", sorted(METHODS.glob("*.py")), ids=lambda file: file.stem)
def test_the_bars_of_methods_take_no_markup(file: Path) -> None:
    """Concepts are named in them."""
    text = file.read_text(encoding="utf-8")
    assert text.count("{task.description}") == text.count('"{task.description}", markup=False')
    assert not re.search(r"add_task\((f|title)", text), "printable() is for texts that a setting gives"


def test_nothing_is_erased_by_the_original_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, title, column in (
        ("original", "cat, the original model", "unchanged"),
        ("uce", "cat erased by uce", "erased"),
    ):
        folder = judged_run(tmp_path / method, method=method)
        train.show(folders.Run(folder, {**folders.read_config(folder), "evaluate": True}))
        said = capsys.readouterr().out
        assert title in said and column in said and "erased by original" not in said
