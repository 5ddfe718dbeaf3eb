"""The system of each run of a sweep, and the axes along which its settings were varied."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from realera.contracts import UserError
from realera.reporting.sweep.systems import (
    JudgedRun,
    differing,
    flat,
    grids,
    name_systems,
    original_of,
    read_run,
    short_names,
    text_of,
    varied,
)
from sweeps import REALERA, grid, judged


def read(folders: list[Path]) -> list[JudgedRun]:
    return [run for run in map(read_run, folders) if run is not None]


def test_settings_that_differ_within_a_method_are_named() -> None:
    settings = [
        {"method": {"name": "uce", "edit": {"ridge": 0.5}}, "seed": 0, "logger": {"id": 1}},
        {"method": {"name": "uce", "edit": {"ridge": 5}}, "seed": 0, "logger": {"id": 2}},
        {"method": {"name": "realera", "edit": {"ridge": 0.5, "lambda_preserve": 0.1}}, "seed": 0},
    ]
    flattened = [flat(one) for one in settings]
    assert flattened[0]["method.edit.ridge"] == 0.5
    assert differing(flattened) == ["method.name", "method.edit.ridge"]
    assert differing(flattened[::2]) == ["method.name"]
    assert differing(flattened[:1]) == []


def test_a_grid_is_named_by_its_axes_and_not_by_derived_settings(tmp_path: Path) -> None:
    runs, twins = name_systems(read(grid(tmp_path)))
    assert not twins and [run.system for run in runs][::2] == [
        f"realera, d1 {d1}, s_lo {s}" for d1 in (5, 10, 20) for s in (0.1, 0.5, 0.9)
    ], "half is d1 / 2, so it adds nothing"
    assert [run.seed for run in runs[:2]] == [0, 1]
    (found,) = grids(runs)
    assert found.title == "realera" and found.filled == 1
    assert found.axes == {"method.neighbours.d1": (5, 10, 20), "method.neighbours.s_lo": (0.1, 0.5, 0.9)}
    assert len(found.cells) == 9 and all(len(cell) == 2 for cell in found.cells.values())
    (typed,) = grids(runs, ["method.neighbours.half", "method.neighbours.s_lo"])
    assert list(typed.axes) == ["method.neighbours.half", "method.neighbours.s_lo"], "a typed setting is an axis"
    (holes,) = grids(runs[2:-4])
    assert holes.filled == pytest.approx(6 / 9)


def test_labels_name_systems_and_do_not_hide_the_axes(tmp_path: Path) -> None:
    folders = []
    for m in (math.inf, 1, 5):
        method = {**REALERA, "neighbours": {**REALERA["neighbours"], "m": m}}
        folders.append(judged(tmp_path / f"{m}", method=method, label=f"M {m}"))
    runs, _ = name_systems(read(folders))
    assert [run.system for run in runs] == ["M 1", "M 5", "M inf"], "ascending, as on the axis"
    assert grids(runs)[0].axes == {"method.neighbours.m": (1, 5, math.inf)} and text_of(math.inf) == "∞"


def test_a_missing_part_is_named_and_concepts_and_seeds_are_not_settings(tmp_path: Path) -> None:
    folders = [
        judged(tmp_path / "a", method={**REALERA, "align": None}),
        judged(tmp_path / "b"),
        judged(tmp_path / "c", concept="dog", task_seed=3),
        judged(tmp_path / "d", method="uce"),
        judged(tmp_path / "e", method="original"),
    ]
    known = read(folders)
    assert varied(known[:3]) == ["method.align"]
    runs, _ = name_systems(known)
    assert list(dict.fromkeys(run.system for run in runs)) == ["uce", "realera, no align", "realera", "original"]
    assert grids(runs) == []


def test_the_later_of_two_indistinguishable_runs_is_used(tmp_path: Path) -> None:
    known = read([judged(tmp_path / "old"), judged(tmp_path / "new"), judged(tmp_path / "other", method="uce")])
    runs, twins = name_systems(known)
    assert [run.folder.name for run in runs] == ["other", "new"] and [run.folder.name for run in twins] == ["old"]


def test_values_with_the_same_short_text_are_written_out(tmp_path: Path) -> None:
    table = "/data/a/long/path/that/is/longer/than/forty/letters/{}.csv"
    nodes = [{**REALERA, "edit": {"ridge": ridge}} for ridge in (1.00000001, 1.00000002, 5)]
    runs, twins = name_systems(read([judged(tmp_path / str(i), method=node) for i, node in enumerate(nodes)]))
    assert [run.system for run in runs] == [
        "realera, ridge 1.00000001",
        "realera, ridge 1.00000002",
        "realera, ridge 5",
    ]
    folders = [judged(tmp_path / name, csv=table.format(name)) for name in ("a", "b")]
    runs, more = name_systems(read(folders))
    assert [run.system for run in runs] == [f"realera, csv {table.format(name)}" for name in ("a", "b")]
    alike = [
        judged(tmp_path / f"x{i}", method={**REALERA, "edit": {"ridge": ridge}}) for i, ridge in enumerate((1, 1.0))
    ]
    assert len(name_systems(read(alike))[0]) == 1 and not twins and not more, "1 and 1.0 are the same value"


def test_the_original_model_is_read_from_the_images_that_a_run_was_compared_to(tmp_path: Path) -> None:
    (run,) = read([judged(tmp_path / "a", cost=3.0)])
    before = original_of(run)
    assert before is not None and before.judged is not None and before.method == before.system == "original"
    assert all(verdict.value == 1 for verdict in before.judged.verdicts) and before.judged.costs == {}
    (run.folder / "verdicts" / "eye.original.jsonl").unlink()
    assert original_of(run) is None


def test_a_folder_that_was_not_judged_is_no_run_and_a_torn_run_is_an_error(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None
    folder = judged(tmp_path / "a")
    (folder / "verdicts" / "eye.jsonl").unlink()
    run = read_run(folder)
    assert run is not None and run.judged is None and run.concept == "cat"
    (folder / "config.yaml").write_text("- a list")
    with pytest.raises(UserError, match="holds no settings"):
        read_run(folder)


def test_short_names_are_only_as_long_as_necessary() -> None:
    names = ["method.edit.rows", "method.neighbours.rows", "method.align.lr", "task.images.keep"]
    assert short_names(names) == {
        "method.edit.rows": "edit.rows",
        "method.neighbours.rows": "neighbours.rows",
        "method.align.lr": "lr",
        "task.images.keep": "keep",
    }
