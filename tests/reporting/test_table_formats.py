"""Tables as files: marks, and well-formed LaTeX, CSV and Markdown with the same content."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from pathlib import Path

from realera.reporting.table_formats import (
    Column,
    Number,
    Table,
    TableRow,
    as_csv,
    as_latex,
    as_markdown,
    latex,
    markdown,
    ranked,
    write,
)

E, S = Column("acc_e", "Acc", "e", "cat", -1), Column("acc_s", "Acc", "s", "cat", 1)


def row(name: str, e: float, s: float, printed: float | None = None, **more: bool) -> TableRow:
    return TableRow((name,), (Number(e, e - 1, e + 1, printed), Number(s)), **more)


def well_formed(text: str) -> list[list[str]]:
    """Checks the structure of a LaTeX table, each tabular separately, and returns the cells of its rows."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert len(re.findall(r"(?<!\\)\{", body)) == len(re.findall(r"(?<!\\)\}", body))
    assert len(re.findall(r"(?<!\\)\$", body)) % 2 == 0
    rows = []
    blocks = re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", body, re.DOTALL)
    assert blocks and body.count("\\begin{") == len(blocks) == body.count("\\toprule") == body.count("\\bottomrule")
    for columns, inner in blocks:
        for line in inner.splitlines():
            if line.startswith(("\\toprule", "\\midrule", "\\bottomrule", "\\cmidrule")):
                continue
            assert line.endswith(" \\\\") and not re.search(r"(?<!\\)[%#]", line), line
            assert not re.search(r"(?<!\\)_(?!\{)", line), "an underscore outside an index"
            cells = re.split(r"(?<!\\)&", line.removesuffix(" \\\\"))
            spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(cells) + spans == len(columns), line
            assert not cells[0].strip().startswith("["), "it would be an argument of the line end"
            rows.append([cell.strip() for cell in cells])
    return rows


def table(groups: int = 1) -> Table:
    columns = tuple(replace(c, group=f"cat_{i}") for i in range(groups) for c in (E, S))
    columns = (E, S) if groups == 1 else columns
    rows = [row("a_1 & 50%", 3.04, 90.0, 2.5), row("b|c", 3.01, 95.0), row("[d]", 9.0, 94.0)]
    rows.append(row("SD", 0.0, 99.0, reference=True))
    wide = [TableRow(r.texts, r.numbers * groups, r.reference) for r in rows]
    return Table("t", "A title", ("system",), columns, ranked(columns, wide), ("A note.",))


def test_the_best_and_the_second_are_marked_by_direction_and_ties_share() -> None:
    marks = [[number and number.mark for number in r.numbers] for r in table().rows]
    assert marks == [["best", ""], ["best", "best"], ["second", "second"], ["", ""]], "3.04 and 3.01 print alike"
    alike = ranked((E, S), [row("a", 1, 1), row("b", 1, 2), TableRow(("c",), (None, Number(math.nan)))])
    assert [r.numbers[0] and r.numbers[0].mark for r in alike] == ["", "", None], "if all are alike, none is best"
    assert [r.numbers[1] and r.numbers[1].mark for r in alike] == ["second", "best", ""]
    steps = ranked((E, S), [row("a", 5, 1), row("b", 1, 2, signed=True), row("c", 6, 3)])
    assert [r.numbers[0] and r.numbers[0].mark for r in steps] == ["best", "", "second"]


def test_latex_is_well_formed_and_escaped() -> None:
    rows = well_formed(as_latex(table()))
    assert rows[0] == ["", "\\multicolumn{2}{c}{cat}"]
    assert rows[1][1:] == ["Acc$_{\\mathrm{e}}$ $\\downarrow$", "Acc$_{\\mathrm{s}}$ $\\uparrow$"]
    assert rows[2] == ["a\\_1 \\& 50\\%", "\\textbf{3.0}", "90.0"]
    assert rows[3] == ["", "{\\scriptsize [2.0, 4.0]}", ""] and rows[4][1] == "{\\scriptsize (2.5)}"
    assert ["{[d]}", "\\underline{9.0}", "\\underline{94.0}"] in rows
    assert latex("\\^~{}<>#$∞") == (
        "\\textbackslash{}\\textasciicircum{}\\textasciitilde{}\\{\\}\\textless{}\\textgreater{}\\#\\$$\\infty$"
    )


def test_latex_that_is_too_wide_is_split_into_several_tabulars() -> None:
    assert latex("− neighbours") == "$-$ neighbours"
    text = as_latex(table(groups=12))
    assert text.count("\\begin{tabular}") == 3
    assert sum(line[0] == "system" for line in well_formed(text)) == 3


def test_csv_has_numbers_intervals_and_the_papers_numbers() -> None:
    heads, *rows = csv.reader(io.StringIO(as_csv(table())))
    keys = [f"cat {name}{kind}" for name in ("acc_e", "acc_s") for kind in ("", "_low", "_high", "_printed")]
    assert heads == ["system", *keys]
    assert rows[0] == ["a_1 & 50%", "3.04", "2.04", "4.04", "2.5", "90", "", "", ""]
    assert [len(cells) for cells in rows] == [9] * 4
    plain = Table("t", "", ("system",), (E,), (TableRow(("a",), (Number(-0.04),), signed=True),))
    assert as_csv(plain) == "system,cat acc_e,cat acc_e_low,cat acc_e_high\na,-0.04,,\n"
    assert "| a | +0.0 |" in as_markdown(plain), "no -0.0"


def test_markdown_marks_escapes_and_keeps_its_columns() -> None:
    lines = as_markdown(table()).splitlines()
    assert lines[0] == "| system | cat Acc_e ↓ | cat Acc_s ↑ |" and lines[1] == "|---|---:|---:|"
    assert lines[2] == "| a_1 & 50% | **3.0** [2.0, 4.0] (paper: 2.5) | 90.0 |"
    assert lines[3].startswith("| b\\|c |") and "<ins>9.0</ins>" in lines[4] and lines[-1] == "A note."


def test_names_are_shown_as_they_are_written() -> None:
    names = {
        "<b>x</b> | *y*": "\\<b>x\\</b> \\| \\*y\\*",
        "_s_lo 0.1_": "\\_s_lo 0.1\\_",
        "a\\|`b` ~~c~~": "a\\\\\\|\\`b\\` \\~\\~c\\~\\~",
    }
    assert {name: markdown(name) for name in names} == names
    assert latex("*a") == "{*a}" and latex("a|b ≥ 1") == "a\\textbar{}b $\\geq$ 1"
    step = TableRow(("+ x",), (Number(-1.5, -2.5, 0.5), Number(1)), signed=True)
    rows = well_formed(as_latex(Table("t", "", ("system",), (E, S), (step,))))
    assert rows[2:] == [["+ x", "$-1.5$", "$+1.0$"], ["", "{\\scriptsize [$-2.5$, $+0.5$]}", ""]]


def test_a_note_is_in_every_format_and_numbers_over_fewer_runs_are_not_ranked() -> None:
    few = TableRow(("b_1|c",), (Number(1, 0, 2, partial=True), Number(99, partial=True)), note="9 of 10 runs")
    rows = ranked((E, S), [row("a", 3, 90), few, row("c", 2, 95)])
    assert [[n and n.mark for n in r.numbers] for r in rows] == [["second", "second"], ["", ""], ["best", "best"]]
    of = Table("t", "", ("system", "part"), (E, S), tuple(replace(r, texts=(*r.texts, "x")) for r in rows))
    heads, *cells = csv.reader(io.StringIO(as_csv(of)))
    assert heads[-1] == "note" and [line[-1] for line in cells] == ["", "9 of 10 runs", ""]
    assert {len(line) for line in cells} == {len(heads)}
    assert "| b_1\\|c (9 of 10 runs) | x | 1.0 [0.0, 2.0] | 99.0 |" in as_markdown(of).splitlines()
    assert ["{\\scriptsize 9 of 10 runs}", "", "{\\scriptsize [0.0, 2.0]}", ""] in well_formed(as_latex(of))
    bare = replace(of, rows=(TableRow(("a", "x"), (Number(1), Number(2)), note="100% & more"),))
    assert ["{\\scriptsize 100\\% \\& more}", "", "", ""] in well_formed(as_latex(bare)), "a separate line"


def test_all_three_formats_are_written(tmp_path: Path) -> None:
    written = write(table(), tmp_path / "tables")
    assert [path.name for path in written] == ["t.csv", "t.tex", "t.md"] and all(path.is_file() for path in written)


def test_a_text_is_not_read_as_a_spreadsheet_formula() -> None:
    for text in ("=HYPERLINK(A1)", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1"):
        column = replace(E, group=text)
        of = Table("t", "", ("system",), (column,), (TableRow((text,), (Number(-3.1, -4, -2),), note=text),))
        heads, cells = csv.reader(io.StringIO(as_csv(of)))
        assert cells[0] == cells[-1] and cells[0] == f"'{text}".translate({9: " ", 10: " ", 13: " "})
        assert cells[1:4] == ["-3.1", "-4", "-2"] and len(heads) == len(cells)
        assert heads[1].startswith("'")
    plain = Table("t", "", ("seed",), (E,), (TableRow(("-3.1",), (Number(1),)), TableRow(("a-b",), (Number(1),))))
    assert [line.split(",")[0] for line in as_csv(plain).splitlines()[1:]] == ["-3.1", "a-b"]


def test_a_text_of_several_lines_is_one_line_in_every_format() -> None:
    hostile = "a\n\\input{/etc/passwd}\r\n% x | y\u2028[z](javascript:alert(1))\x00"
    row_of = TableRow((hostile,), (Number(1), Number(2)), note=hostile)
    of = Table("t", hostile, (hostile,), (replace(E, group=hostile), S), (row_of,), (hostile,))
    tex = as_latex(of)
    well_formed(tex)
    assert "\\input" not in "\n".join(line for line in tex.splitlines() if not line.startswith("%"))
    assert tex.count("% a \\input") == 2 and "\x00" not in tex
    lines = as_markdown(of).split("\n")
    assert [line[:1] for line in lines[:3]] == ["|"] * 3 and len(lines) == 6
    assert len(re.split(r"(?<!\\)\|", lines[2])) == 5
    assert " [z](" not in as_markdown(of) and "\u2028" not in as_markdown(of)
