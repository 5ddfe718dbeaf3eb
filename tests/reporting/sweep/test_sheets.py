"""Image sheets of a sweep: the same prompts and seeds for every system."""

from __future__ import annotations

import shutil
from pathlib import Path

from realera.reporting.sweep.chapter import Chapter
from realera.reporting.sweep.page import _originals
from realera.reporting.sweep.sheets import MOST_CONCEPTS, cut, sheets_of
from realera.reporting.sweep.systems import name_systems, read_run
from sweeps import judged


def chapter(folders: list[Path]) -> Chapter:
    runs = name_systems([run for run in map(read_run, folders) if run is not None])[0]
    return Chapter("object", "object", [*runs, *_originals(runs)])


def test_rows_are_systems_with_the_original_model_first_and_columns_are_shared(tmp_path: Path) -> None:
    folders = [
        judged(tmp_path / f"{m}{s}", seed=s, method=m, pictures=True) for m in ("uce", "realera") for s in (0, 1)
    ]
    (sheet,) = sheets_of(chapter(folders))
    assert sheet.concept == "cat" and sheet.seed == 0
    assert [split for _, split in sheet.heads] == ["erase"] * 3 + ["near"] * 3 + ["keep"] * 3
    assert [system for system, _ in sheet.rows] == ["original", "uce", "realera"]
    titles = [[p.title.partition(":")[0] for p in pictures if p] for _, pictures in sheet.rows]
    assert titles[0] == titles[1] == titles[2] and "seed 0" in titles[0][0]
    originals, erased = ({p.uri for p in pictures if p} for _, pictures in (sheet.rows[0], sheet.rows[2]))
    assert len(originals) == len(erased) == 1 and originals != erased
    assert [p and p.good for p in sheet.rows[2][1]][:3] == [True] * 3


def test_the_limits_of_a_page_are_named(tmp_path: Path) -> None:
    folders = [judged(tmp_path / str(i), f"thing {i}", pictures=True) for i in range(MOST_CONCEPTS + 1)]
    assert len(sheets_of(chapter(folders))) == MOST_CONCEPTS and cut(chapter(folders[:-1])) == ""
    assert cut(chapter(folders)) == f"Shown: the first {MOST_CONCEPTS} of {MOST_CONCEPTS + 1} concepts."


def test_missing_images_leave_empty_cells_and_without_images_there_is_no_sheet(tmp_path: Path) -> None:
    folders = [
        judged(tmp_path / "a", method="uce", pictures=True),
        judged(tmp_path / "b", shares={"erase": 0.0, "keep": 1.0}, pictures=True),
    ]
    (sheet,) = sheets_of(chapter(folders))
    assert [p is None for p in sheet.rows[2][1]] == [False] * 3 + [True] * 3 + [False] * 3
    for folder in folders:
        shutil.rmtree(folder / "images")
        shutil.rmtree(folder / "originals")
    assert sheets_of(chapter(folders)) == []


def test_the_original_models_own_run_is_the_first_row(tmp_path: Path) -> None:
    folders = [
        judged(tmp_path / "a", method="uce", pictures=True),
        judged(tmp_path / "o", method="original", pictures=True),
    ]
    (sheet,) = sheets_of(chapter(folders))
    assert [system for system, _ in sheet.rows] == ["original", "uce"]
    assert {p.uri for p in sheet.rows[0][1] if p} == {p.uri for p in sheet.rows[1][1] if p}, (
        "its images, not originals/"
    )
