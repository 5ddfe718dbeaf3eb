"""The figures of a sweep as files."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from realera.reporting.charts import Tick
from realera.reporting.sweep.figures import Dot, Line, Scatter, Surface
from realera.reporting.table_formats import Column

pytest.importorskip("matplotlib")

from realera.reporting.sweep import plots

E = Column("acc_e", "Acc", "e", better=-1)
FIGURES = [
    Surface(
        "s",
        E,
        ("d1", "s_lo"),
        ("1", "2"),
        ("3", "4", "5"),
        (((1.0, 0.0, 2.0), (2.0, 1.0, 3.0)), ((3.0, 2.0, 4.0), None), ((5.0, 4.0, 6.0), (6.0, 5.0, 7.0))),
        (),
    ),
    Line("l", E, "m_1", ("1", "∞"), ((1.0, 0.0, 2.0), (2.0, 1.0, 3.0)), ()),
    Scatter("c", (Dot("a_b & $", 3.0, (50.0, 40.0, 60.0), 0, 0, 0, 0),), [Tick(0, "1 s")], [Tick(0, "50")]),
]


@pytest.mark.parametrize("figure", FIGURES, ids=["surface", "line", "scatter"])
def test_a_figure_is_written_as_reproducible_png_and_svg(figure: Surface | Line | Scatter, tmp_path: Path) -> None:
    png, svg = plots.write(figure, tmp_path / "one")
    assert min(Image.open(png).size) > 500 and svg.read_text(encoding="utf-8").count("</svg>") == 1
    again = plots.write(figure, tmp_path / "two")
    assert [path.read_bytes() for path in again] == [png.read_bytes(), svg.read_bytes()]


def test_long_names_leave_room_for_the_plot(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    dots = tuple(
        Dot(f"method.align.lr {n} method.align.steps {n} costs $1 or $2", n, (50.0, 40.0, 60.0), 0, 0, 0, 0)
        for n in range(1, 13)
    )
    png, _ = plots.write(Scatter("c", dots, [Tick(0, "1 s")], [Tick(0, "50")]), tmp_path)
    assert not [str(warning.message) for warning in recwarn if "layout" in str(warning.message)]
    svg = (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert "method.align.lr 12" in svg
    width, height = Image.open(png).size
    dark = Image.open(png).convert("L").crop((width // 2, 0, width, height // 2)).point(lambda v: 255 * (v < 200))
    assert dark.getbbox() is not None, "dots are in the right half, above the names"


@pytest.mark.slow
def test_a_hundred_systems_leave_room_for_the_plot_and_each_is_named(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    dots = tuple(Dot(f"_d1 {n}, s_lo 0.1", n, (50.0, 40.0, 60.0), 0, 0, 0, 0) for n in range(1, 101))
    png, svg = plots.write(Scatter("c", dots, [Tick(0, "1 s")], [Tick(0, "50")]), tmp_path)
    assert not [str(warning.message) for warning in recwarn if "layout" in str(warning.message)]
    text = svg.read_text(encoding="utf-8")
    assert all(f"_d1 {n}, s_lo" in text for n in (1, 50, 100)), "an underscore hides no name"
    assert Image.open(png).size[1] > Image.open(png).size[0]


def test_a_face_with_a_missing_corner_is_not_drawn(tmp_path: Path) -> None:
    cells = ((10.0, 9.0, 11.0), (20.0, 19.0, 21.0))
    whole = Surface("s", E, ("x", "y"), ("1", "2"), ("1", "2"), (cells, cells), ())
    holed = Surface("s", E, ("x", "y"), ("1", "2"), ("1", "2"), (cells, (cells[0], None)), ())

    def coloured(figure: Surface) -> int:
        png, _ = plots.write(figure, tmp_path)
        left = Image.open(png).convert("RGB").crop((0, 0, 800, 760))
        return sum(left.convert("HSV").getchannel("S").histogram()[100:])

    assert coloured(whole) > 10_000 and coloured(holed) == 0, "the missing face has not the colour of the lowest value"
