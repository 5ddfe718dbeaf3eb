"""Surfaces, lines and the scatter of a sweep as numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from realera.contracts import Split
from realera.reporting.sweep.chapter import Chapter
from realera.reporting.sweep.figures import COLOURS, Line, Surface, colour, corrected, families, scatter
from realera.reporting.sweep.systems import name_systems, read_run
from realera.reporting.sweep.trends import holm
from realera.reporting.table_formats import Column
from sweeps import REALERA, grid, judged


def chapter(folders: list[Path]) -> Chapter:
    return Chapter("object", "object", name_systems([run for run in map(read_run, folders) if run is not None])[0])


def test_two_settings_make_surfaces_with_the_tables_numbers(tmp_path: Path) -> None:
    of = chapter(grid(tmp_path)[:-2])  # the last cell is missing
    (family,) = families(of)
    assert family.title == "realera: d1 and s_lo" and family.note == ""
    assert [figure.name for figure in family.figures] == [
        f"object-grid-{measure}" for measure in ("acc_e", "acc_s", "acc_g", "h_o")
    ]
    acc_g = family.figures[2]
    assert isinstance(acc_g, Surface) and acc_g.x == ("5", "10", "20") and acc_g.y == ("0.1", "0.5", "0.9")
    assert acc_g.values[2][2] is None
    first = of.means["realera, d1 5, s_lo 0.1"]["acc_g"].estimate()
    assert acc_g.values[0][0] == (first.value, first.low, first.high) == pytest.approx((50, first.low, first.high))
    falls, rises = (one.sentence for one in acc_g.trends)
    assert (
        falls.startswith("Acc_g falls as d1 increases: rank correlation -1.00") and "the paper says the same" in falls
    )
    assert rises.startswith("Acc_g rises with s_lo") and "from 0.1 to 0.9" in rises
    assert acc_g.data["values"] is acc_g.values and acc_g.data["x"]["labels"] == acc_g.x
    assert acc_g.colour(acc_g.span[0]) == COLOURS[0] and acc_g.bright(acc_g.span[1]) and not acc_g.bright(acc_g.span[0])


def test_a_measure_that_no_run_of_a_grid_has_gets_no_figure(tmp_path: Path) -> None:
    def run(name: str, d1: int, s_lo: float, *lacks: str) -> Path:
        node = {**REALERA, "neighbours": {**REALERA["neighbours"], "d1": d1, "s_lo": s_lo}}
        shares: dict[Split, float] = {"erase": 0.5, "near": 0.5, "keep": 1.0, "unseen": 0.5}
        left = {split: share for split, share in shares.items() if split not in lacks}
        return judged(tmp_path / name, method=node, shares=left)

    line = [run(f"line{d1}", d1, 0.5, "near") for d1 in (1, 2, 3)]
    other = judged(tmp_path / "uce", method="uce", terms=("acc_e", "acc_s"))
    (family,) = families(chapter([*line, other]))
    assert [figure.name[-5:] for figure in family.figures] == ["acc_e", "acc_s"], "only the other run has acc_g"
    nothing = [run(f"none{d1}", d1, 0.5, "erase", "near", "keep") for d1 in (1, 2, 3)]
    assert families(chapter([*nothing, other])) == []


def test_the_trends_of_a_page_are_corrected_for_their_number(tmp_path: Path) -> None:
    found = families(chapter(grid(tmp_path)))
    ((family,), (again,)), trends = corrected([found, found])
    assert trends == 8, "four measures along two axes; a trend in two figures counts once"
    assert family == again
    before = {(one.symbol, one.axis): one.trend for figure in found[0].figures for one in figure.trends}
    after = {(one.symbol, one.axis): one.trend for figure in family.figures for one in figure.trends}
    assert {one.among for one in after.values()} == {8}
    assert dict(zip(before, holm([one.p for one in before.values()]))) == {at: one.p for at, one in after.items()}
    assert min(one.p for one in before.values()) < min(one.p for one in after.values())


def test_one_setting_with_three_values_makes_lines_and_with_two_none(tmp_path: Path) -> None:
    nodes = [{**REALERA, "edit": {"ridge": ridge}} for ridge in (0.1, 1, 100)]
    folders = [
        judged(tmp_path / str(i), method=node, shares={"erase": 0.25 * i, "near": 0.0, "keep": 1.0}, images=8)
        for i, node in enumerate(nodes)
    ]
    (family,) = families(chapter(folders))
    line = family.figures[0]
    assert isinstance(line, Line) and line.axis == "ridge" and line.x == ("0.1", "1", "100")
    assert [point[0] for point in line.points] == pytest.approx([10, 30, 50])
    assert line.polyline.split()[0] == f"{100 / 6:.2f},{line.at(10):.2f}" and len(line.band.split()) == 6
    assert line.at(line.marks[0]) == 100 and line.at(line.marks[-1]) == 0
    assert families(chapter(folders[:2])) == []


def test_three_settings_have_surfaces_of_means_for_each_pair(tmp_path: Path) -> None:
    folders = []
    for m in (1, 2, 3):
        for n in (1, 2):
            for rank in (1, 2):
                node = {**REALERA, "neighbours": {"m": m, "n": n}, "align": {"steps": 1, "rank": rank}}
                shares = {"erase": 0.25 * (rank - 1), "near": 0.0, "keep": 1.0}
                folders.append(judged(tmp_path / f"{m}{n}{rank}", method=node, shares=shares))
    found = families(chapter(folders))
    assert [family.title for family in found] == ["realera: m and n", "realera: m and rank", "realera: n and rank"]
    assert [family.note for family in found] == ["Means over rank.", "Means over n.", "Means over m."]
    surface = found[0].figures[0]
    assert isinstance(surface, Surface) and surface.values[0][0] is not None
    assert surface.values[0][0][0] == pytest.approx((10 + 30) / 2)
    assert len({figure.name for family in found for figure in family.figures}) == 12


def test_settings_that_were_searched_and_form_no_grid_have_no_surface(tmp_path: Path) -> None:
    nodes = [{**REALERA, "edit": {"ridge": 0.1 * i, "lambda": 3.0 / (i + 1)}} for i in range(1, 5)]
    assert families(chapter([judged(tmp_path / str(i), method=node) for i, node in enumerate(nodes)])) == []


def test_cost_against_h_o(tmp_path: Path) -> None:
    folders = [
        judged(tmp_path / name, method=name, cost=cost)
        for name, cost in (("uce", 1.0), ("mace", 1000.0), ("spm", None), ("realera", 30.0))
    ]
    found = scatter(chapter(folders))
    assert found is not None and [dot.system for dot in found.dots] == ["uce", "realera", "mace"]
    assert [tick.label for tick in found.x] == ["1 s", "10 s", "100 s", "1000 s"], (
        "powers of ten, because the costs are far apart"
    )
    assert found.dots[0].x == 0 and found.dots[2].x == 100 and 40 < found.dots[1].x < 60
    assert all(dot.high <= dot.y <= dot.low for dot in found.dots)
    assert scatter(chapter(folders[:1])) is None


def test_colours_run_from_the_first_to_the_last() -> None:
    assert colour(0, 0, 8) == COLOURS[0] and colour(8, 0, 8) == COLOURS[-1] and colour(3, 0, 8) == COLOURS[3]
    assert colour(5, 5, 5) == COLOURS[4]


@pytest.mark.parametrize(
    ("at", "shown"), [((0.001, 0.002), (0, 1)), ((99.2, 99.4), (98.8, 99.8)), ((0.0, 0.0), (0, 1)), ((3, 8), (3, 8))]
)
def test_negligible_differences_look_alike(at: tuple[float, float], shown: tuple[float, float]) -> None:
    """Thousandths of a percent change neither the colour nor the height visibly."""
    low, high = ((value, value, value) for value in at)
    figure = Surface(
        "grid", Column("acc_e", "Acc", "e"), ("d1", "s_lo"), ("5", "10"), ("0.1", "0.5"), ((low, low), (high, None)), ()
    )
    assert figure.span == pytest.approx(shown)
    assert figure.marks[0] <= shown[0] and figure.marks[-1] >= shown[1]
