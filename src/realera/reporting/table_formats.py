"""A table as a value, and its written forms: CSV, LaTeX (booktabs) and Markdown. The page has a template of its own."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from realera.system import disk

GROUPS_A_LINE = 5  # groups of columns that stand side by side on a LaTeX page
Mark = Literal["", "best", "second"]


@dataclass(frozen=True)
class Number:
    """A number of a table. low, high: its interval, NaN where it has none. printed: the paper's, None where it prints
    none. mark: its rank in its column. partial: it is of fewer runs than others of its column; least: it is that much
    or more. Neither is ranked."""

    value: float
    low: float = math.nan
    high: float = math.nan
    printed: float | None = None
    mark: Mark = ""
    partial: bool = False
    least: bool = False

    @property
    def known(self) -> bool:
        return not math.isnan(self.value)

    @property
    def has_interval(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))


@dataclass(frozen=True)
class Column:
    """symbol, index: of its head ("Acc", "e"); key: in CSV; group: what stands above several columns (a concept), "";
    better: 1 more is, -1 less is, 0 neither; digits: decimals that are printed."""

    key: str
    symbol: str
    index: str = ""
    group: str = ""
    better: int = 0
    digits: int = 1

    def text(self, value: float, sign: bool = False) -> str:
        rounded = round(value, self.digits) + 0.0  # no "-0.0"
        return f"{rounded:{'+' if sign else ''}.{self.digits}f}"

    @property
    def arrow(self) -> str:
        return {1: "↑", -1: "↓"}.get(self.better, "")


@dataclass(frozen=True)
class Row:
    """texts: one of each text head. numbers: one of each column, None where there is nothing. reference: held apart
    from the ranking (the unedited model). note: said under its name. signed: numbers are differences."""

    texts: tuple[str, ...]
    numbers: tuple[Number | None, ...]
    reference: bool = False
    note: str = ""
    signed: bool = False


@dataclass(frozen=True)
class Table:
    """name: of its files; heads: of its text columns."""

    name: str
    title: str
    heads: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(what stands above them, how many columns), in order."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found

    @property
    def has_printed(self) -> bool:
        return any(number and number.printed is not None for row in self.rows for number in row.numbers)


def _apart(number: Number, row: Row) -> bool:
    return number.partial or number.least or row.reference or row.signed


def ranked(columns: Sequence[Column], rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with the best of each column marked, and the second; what reads alike is alike, and where all read
    alike, or there is one row only, nothing is marked. What is of fewer runs than others is no rival of theirs: one
    system alone may have missed the hard ones."""
    marks: dict[tuple[int, int], Mark] = {}
    for j, column in enumerate(columns):
        found = [
            (i, round(number.value, column.digits) * column.better)
            for i, row in enumerate(rows)
            if (number := row.numbers[j]) and number.known and not _apart(number, row)
        ]
        places = sorted({value for _, value in found}, reverse=True)
        if not column.better or len(places) < 2:
            continue
        for i, value in found:
            marks[i, j] = "best" if value == places[0] else "second" if value == places[1] else ""
    return tuple(
        replace(row, numbers=tuple(n and replace(n, mark=marks.get((i, j), "")) for j, n in enumerate(row.numbers)))
        for i, row in enumerate(rows)
    )


def write(table: Table, folder: Path) -> list[Path]:
    """folder/<name>.csv, .tex and .md."""
    written = []
    for kind, form in (("csv", as_csv), ("tex", as_latex), ("md", as_markdown)):
        path = folder / f"{table.name}.{kind}"
        disk.write_text(path, form(table))
        written.append(path)
    return written


def as_csv(table: Table) -> str:
    """A line a row: value, low, high and what the paper prints, each a column; numbers to four decimals. The last
    column holds the rows' notes, if any has one."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")

    def write(texts: Sequence[str], cells: Sequence[str], more: Sequence[str]) -> None:
        writer.writerow([*map(_as_text, texts), *cells, *map(_as_text, more)])

    kinds = ("", "_low", "_high", *(["_printed"] * table.has_printed))
    keys = [f"{c.group} {c.key}{kind}".strip() for c in table.columns for kind in kinds]
    noted = any(row.note for row in table.rows)
    write([*table.heads, *keys], [], ["note"] * noted)
    for row in table.rows:
        cells: list[str] = []
        for number in row.numbers:
            values = [math.nan] * 3 if number is None else [number.value, number.low, number.high]
            cells += ["" if math.isnan(v) else f"{round(v, 4):.12g}" for v in values]
            if table.has_printed:
                cells.append("" if number is None or number.printed is None else f"{number.printed:g}")
        write(row.texts, cells, [row.note] * noted)
    return out.getvalue()


def _as_text(text: str) -> str:
    """A text of one line that a spreadsheet takes for one: a formula's first sign gets an apostrophe before it."""
    text = one_line(text)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip(" ").startswith(("=", "+", "-", "@")) else text
    return text


def as_markdown(table: Table) -> str:
    """Value and interval in each cell, the best in bold, the second underlined (by <ins>, for GitHub drops <u>), the
    paper's number behind. A row's note stands in brackets behind its name."""
    heads = [*table.heads]
    for column in table.columns:
        name = f"{column.symbol}_{column.index}" if column.index else column.symbol
        heads.append(" ".join(filter(None, [column.group, name, column.arrow])))
    lines = [f"| {' | '.join(map(markdown, heads))} |", f"|{'---|' * len(table.heads)}{'---:|' * len(table.columns)}"]
    for row in table.rows:
        cells = []
        for column, number in zip(table.columns, row.numbers):
            if number is None or not number.known:
                cells.append("–")
                continue
            text = column.text(number.value, row.signed)
            text = {"best": f"**{text}**", "second": f"<ins>{text}</ins>"}.get(number.mark, text)
            if number.has_interval:
                text += f" [{column.text(number.low, row.signed)}, {column.text(number.high, row.signed)}]"
            if number.printed is not None:
                text += f" (paper: {number.printed:g})"
            cells.append(text)
        name = f"{row.texts[0]} ({row.note})" if row.note else row.texts[0]
        lines.append(f"| {' | '.join([*map(markdown, (name, *row.texts[1:])), *cells])} |")
    notes = "".join(f"\n{markdown(note)}\n" for note in table.notes)
    return "\n".join(lines) + "\n" + notes


def markdown(text: str) -> str:
    """Plain text in a cell of a Markdown table: what has a meaning there is escaped, an underscore within a word has
    none."""
    return re.sub(r"[\\`*|<~]|(?<!\w)_|_(?!\w)|\[(?=[^\]]*\]\()", r"\\\g<0>", one_line(text))


def one_line(text: str) -> str:
    """The text with blanks in place of line breaks and other control characters."""
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", text)


def as_latex(table: Table) -> str:
    """booktabs; a row's note with the intervals, and the paper's numbers, in smaller lines under the row. More groups
    of columns than fit side by side stand in tabulars one under the other."""
    blocks: list[list[int]] = []
    start = 0
    for i, (_, count) in enumerate(table.groups):
        columns = list(range(start, start + count))
        start += count
        if i % GROUPS_A_LINE == 0:
            blocks.append(columns)
        else:
            blocks[-1] += columns
    notes = "".join(f"% {one_line(note)}\n" for note in table.notes)
    body = "\n\n\\medskip\n\n".join(_tabular(table, block) for block in blocks)
    return f"% {one_line(table.title)}\n{notes}% Needs \\usepackage{{booktabs}}.\n{body}\n"


def _tabular(table: Table, chosen: Sequence[int]) -> str:
    columns = [table.columns[j] for j in chosen]
    texts = len(table.heads)
    lines = [f"\\begin{{tabular}}{{{'l' * texts}{'r' * len(columns)}}}", "\\toprule"]
    groups = replace(table, columns=tuple(columns)).groups
    if any(name for name, _ in groups):
        above = ["" for _ in table.heads] + [
            f"\\multicolumn{{{count}}}{{c}}{{{latex(name)}}}" for name, count in groups
        ]
        lines.append(f"{' & '.join(above)} \\\\")
        at = texts + 1
        for _, count in groups:
            lines.append(f"\\cmidrule(lr){{{at}-{at + count - 1}}}")
            at += count
    heads = [*map(latex, table.heads), *(_head(column) for column in columns)]
    lines += [f"{' & '.join(heads)} \\\\", "\\midrule"]
    for i, row in enumerate(table.rows):
        if row.reference and i:
            lines.append("\\midrule")
        pairs = list(zip(columns, (row.numbers[j] for j in chosen)))
        values = [_value(column, number, row.signed) for column, number in pairs]
        lines.append(f"{' & '.join([*map(latex, row.texts), *values])} \\\\")
        intervals = [
            f"{{\\scriptsize [{_signed(c.text(n.low, row.signed))}, {_signed(c.text(n.high, row.signed))}]}}"
            if n and n.has_interval
            else ""
            for c, n in pairs
        ]
        printed = [f"{{\\scriptsize ({n.printed:g})}}" if n and n.printed is not None else "" for _, n in pairs]
        note = f"{{\\scriptsize {latex(row.note)}}}" if row.note else ""
        smaller = [(note, intervals)] * (bool(note) or any(intervals))
        smaller += [("{\\scriptsize printed}", printed)] * any(printed)
        for what, small in smaller:
            lines.append(f"{' & '.join([what, *([''] * (texts - 1)), *small])} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def _head(column: Column) -> str:
    arrow = {1: " $\\uparrow$", -1: " $\\downarrow$"}.get(column.better, "")
    index = f"$_{{\\mathrm{{{latex(column.index)}}}}}$" if column.index else ""
    return f"{latex(column.symbol)}{index}{arrow}"


def _value(column: Column, number: Number | None, signed: bool) -> str:
    if number is None or not number.known:
        return "--"
    text = _signed(column.text(number.value, signed))
    return {"best": f"\\textbf{{{text}}}", "second": f"\\underline{{{text}}}"}.get(number.mark, text)


def _signed(text: str) -> str:
    """A number with a minus in place of a hyphen."""
    return f"${text}$" if text[0] in "+-" else text


_SPECIAL = {
    "\\": "\\textbackslash{}",
    "&": "\\&",
    "%": "\\%",
    "$": "\\$",
    "#": "\\#",
    "_": "\\_",
    "{": "\\{",
    "}": "\\}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "≥": "$\\geq$",
    "≤": "$\\leq$",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
    "∞": "$\\infty$",
    "✓": "$\\surd$",
    "–": "--",
    "−": "$-$",
    "…": "\\dots{}",
}


def latex(text: str) -> str:
    """Plain text as LaTeX: what has a meaning there is escaped. A bracket or a star at the start of a row would be
    read as a part of the line's end before it."""
    escaped = "".join(_SPECIAL.get(letter, letter) for letter in one_line(text))
    return f"{{{escaped}}}" if escaped.startswith(("[", "*")) else escaped
