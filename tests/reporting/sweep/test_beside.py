"""Metrics that the papers do not print: what replaces the concept, how far preserved images change, and each measure in
percent of the original model's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realera import console
from realera.contracts import Prompt, UserError, Verdict
from realera.evaluation.judge import judge_run
from realera.evaluation.measures import EXTRA_MODES, MEAN_PROB, column_heading, score
from realera.evaluation.metrics import summarise
from realera.evaluation.moved import moved
from realera.evaluation.records import ORIGINALS, ManifestEntry, read_verdicts, verdict_file, write_manifest
from realera.reporting import page_rows
from realera.reporting.pooling import RunVerdicts
from realera.reporting.table import markdown, table


def _picture(path: Path, value: int | np.ndarray, side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.broadcast_to(np.uint8(value), (side, side, 3))).save(path)
    return path


def test_an_image_moves_by_the_root_mean_square_of_its_pixels(tmp_path: Path) -> None:
    black, white, gray = (_picture(tmp_path / f"{v}.png", v) for v in (0, 255, 51))
    assert (moved(black, black), moved(black, white), moved(black, gray)) == (0, 100, pytest.approx(20))
    half = np.zeros((8, 8, 3), dtype=np.uint8)
    half[:4] = 255
    assert moved(black, _picture(tmp_path / "half.png", half)) == pytest.approx(100 / math.sqrt(2), abs=1e-4)
    with pytest.raises(UserError, match="differ in size"):
        moved(black, _picture(tmp_path / "large.png", 0, side=9))


class _Sure:
    name = "sure"

    def __call__(self, images: list[Path], prompts: list[Prompt]) -> list[Verdict]:
        return [Verdict(prompt.id, 0.5, "cat", {"score": 1.0}) for prompt in prompts]


def test_judging_measures_the_change_of_preserved_images(tmp_path: Path) -> None:
    """Only for preserved images that have an original, and not for the originals themselves."""
    rows = []
    for name, split, original in (("a", "erase", True), ("b", "keep", True), ("c", "keep", False)):
        _picture(tmp_path / f"images/{name}.png", 51)
        _picture(tmp_path / f"{ORIGINALS}/{name}.png", 0)
        prompt = Prompt(name, "a photo", "cat", split, 0)
        rows.append(ManifestEntry(prompt, f"images/{name}.png", "x", f"{ORIGINALS}/{name}.png" if original else None))
    write_manifest(tmp_path, rows)
    said = judge_run(_Sure(), tmp_path)
    assert [v.detail for v in said] == [{"score": 1.0}, {"score": 1.0, "moved": 20.0}, {"score": 1.0}]
    assert read_verdicts(verdict_file(tmp_path, "sure")) == said
    write_manifest(tmp_path, rows[:2])
    assert all(v.detail == {"score": 1.0} for v in judge_run(_Sure(), tmp_path, "original"))


def test_these_metrics_have_arrows_and_are_unscored_without_a_judge_that_supports_them() -> None:
    heads = [
        column_heading(*pair)
        for pair in (("acc_e", "whole"), ("acc_e", "anchor"), ("acc_s", "moved"), ("acc_s", "top1"))
    ]
    assert heads == ["Whole_e ↑", "Anchor_e ↑", "Moved_s ↓", "Acc_s ↑"]
    prompt, verdict = Prompt("p", "a cat", "cat", "erase", 0), Verdict("p", 0.9, "cat", {"whole": True, "moved": 2.5})
    assert score(prompt, verdict, "whole") == 100 and score(prompt, verdict, "moved") == 2.5
    assert math.isnan(score(prompt, verdict, "anchor"))


def _cell(
    system: str, concept: str, erased: float, unseen: float, whole: bool | None, change: float | None
) -> RunVerdicts:
    shares = {"erase": [erased] * 4, "near": [0.2] * 4, "keep": [0.9] * 4, "unseen": [unseen, unseen / 2] * 2}
    prompts, verdicts = [], []
    for split, values in shares.items():
        for i, value in enumerate(values):
            prompts.append(Prompt(f"{split}-{i}", "a photo", concept, split, i))
            said = {} if whole is None else {"whole": whole, "anchor": whole and i == 0}
            said |= {"moved": change + i} if change is not None and split == "keep" else {}
            verdicts.append(Verdict(prompts[-1].id, value, concept, said))
    return RunVerdicts(system, concept, 0, prompts, verdicts)


SMEARS = [_cell("smears", name, 0.0, 0.01, False, 20.0) for name in ("cat", "dog")]
TURNS = [_cell("turns", name, 0.0, 0.1, True, 5.0) for name in ("cat", "dog")]
BEFORE = [_cell("original", name, 1.0, 0.2, True, None) for name in ("cat", "dog")]


def test_a_smear_is_distinguished_from_the_anchor() -> None:
    """Acc_e, Acc_s and Acc_g are equal for the two systems."""
    found = table([*SMEARS, *TURNS, *BEFORE], base="smears")
    smears, turns, before = found["rows"]
    assert smears["mean"]["acc_e"]["value"] == turns["mean"]["acc_e"]["value"] == 0
    assert smears["by_mode"]["whole"]["acc_e"]["value"] == 0 and turns["by_mode"]["whole"]["acc_e"]["value"] == 100
    assert turns["by_mode"]["whole"]["acc_e"]["low"] < 100, "an exact interval if all images are alike"
    assert turns["by_mode"]["anchor"]["acc_e"]["value"] == 25
    assert smears["by_mode"]["moved"]["acc_s"]["value"] == 21.5
    assert not [mode for row in found["rows"] for mode in EXTRA_MODES if "h_o" in row["by_mode"].get(mode, {})]
    assert "moved" not in before["by_mode"], "the original model's images cannot have changed"
    apart = found["differences"]["by_mode"]
    assert [row["system"] for row in apart["moved"]] == ["turns"]
    assert apart["moved"][0]["mean"]["acc_s"]["value"] == -15
    text = markdown(found)
    assert "| system | Whole_e ↑ | Anchor_e ↑ | Moved_s ↓ |" in text
    assert [line for line in text.splitlines() if line.startswith("| original") and line.endswith("– |")]
    assert "Whole_e" not in markdown(table([_cell("a", "cat", 0.1, 0.1, None, None)]))


def test_each_measure_is_given_in_percent_of_the_original_model() -> None:
    """Paired by image: a system that halves every value has exactly 50 percent, without any spread."""
    found = table([*SMEARS, *TURNS, *BEFORE])["relative"]
    assert list(found) == ["smears", "turns"]
    assert found["turns"]["acc_u"] == {"value": 50.0, "low": 50.0, "high": 50.0}
    assert found["smears"]["acc_u"]["value"] == 5 and found["smears"]["acc_s"]["value"] == 100
    assert "h_o" not in found["turns"] and "relative" not in table(SMEARS)
    nothing = [_cell("original", name, 1.0, 0.0, True, None) for name in ("cat", "dog")]
    assert "acc_u" not in table([*TURNS, *nothing])["relative"]["turns"], "a share of 0 is undefined"
    assert "In percent of the original model's value." in markdown(table([*TURNS, *BEFORE]))


def test_the_page_and_the_table_of_a_run_show_them_next_to_the_original() -> None:
    run, was = TURNS[0], BEFORE[0]
    metrics = {**summarise(run.prompts, run.verdicts, was.verdicts), "protocol": {}}
    assert "h_o" not in metrics["whole"] and metrics["headline"] == MEAN_PROB
    shown = {line.name: line for line in page_rows.measures(metrics).lines}
    assert (shown["acc_e_whole"].after["value"], shown["acc_e_whole"].before["value"]) == (100, 100)
    assert shown["acc_e_anchor"].after["value"] == 25 and shown["acc_e_anchor"].higher
    assert shown["acc_s_moved"].before is None and not shown["acc_s_moved"].higher
    assert list(shown)[:4] == ["acc_e", "acc_g", "acc_s", "h_o"], "the measures of the papers come first"
    assert page_rows.sentences(metrics)[1] == (
        "Of the images prompted by name, 100% show something whole, the concept or not (100% before)."
    )
    with console.console.capture() as printed:
        console.console.print(console.results(metrics, "cat"))
    text = " ".join(printed.get().split())
    assert "Whole_e ↑ something │ 100.0" in text and "Moved_s ↓ the others │ - │ 6.5" in text
    plain = replace(run, verdicts=[replace(v, detail={}) for v in run.verdicts])
    assert not [
        n for n in page_rows.measures(summarise(plain.prompts, plain.verdicts, None)).lines if "_" in n.name[4:]
    ]
