"""The table as a data type, and its formats: CSV, LaTeX (booktabs) and Markdown. The page uses its own template."""

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

GROUPS_A_LINE = 5  # groups of columns side by side in one LaTeX tabular
Mark = Literal["", "best", "second"]


@dataclass(frozen=True)
class Number:
    """A number of a table. low, high: its interval, NaN without one. printed: the paper's number, None without one.
    mark: its rank in its column. partial: it is over fewer runs than others of its column; least: it is a lower bound.
    Partial numbers and lower bounds are not ranked."""

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
    """key: its name in CSV. symbol, index: its head ("Acc", "e"). group: a common head above several columns (a
    concept), or "". better: 1 if higher is better, -1 if lower is, 0 if neither. digits: printed decimals."""

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
class TableRow:
    """texts: one per text head. numbers: one per column, None if empty. reference: not ranked (the original model).
    note: a line below its name. signed: the numbers are differences."""

    texts: tuple[str, ...]
    numbers: tuple[Number | None, ...]
    reference: bool = False
    note: str = ""
    signed: bool = False


@dataclass(frozen=True)
class Table:
    """name: stem of its files. heads: heads of its text columns."""

    name: str
    title: str
    heads: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(group, number of columns), in order."""
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


def _unranked(number: Number, row: TableRow) -> bool:
    return number.partial or number.least or row.reference or row.signed


def ranked(columns: Sequence[Column], rows: Sequence[TableRow]) -> tuple[TableRow, ...]:
    """The rows with the best and second number of each column marked. Numbers that print alike are tied; if all are
    tied or there is only one, none is marked. Partial numbers are not ranked: their system may have missed the hard
    runs."""
    marks: dict[tuple[int, int], Mark] = {}
    for j, column in enumerate(columns):
        found = [
            (i, round(number.value, column.digits) * column.better)
            for i, row in enumerate(rows)
            if (number := row.numbers[j]) and number.known and not _unranked(number, row)
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
    """Writes folder/<name>.csv, .tex and .md and returns their paths."""
    written = []
    for kind, form in (("csv", as_csv), ("tex", as_latex), ("md", as_markdown)):
        path = folder / f"{table.name}.{kind}"
        disk.write_text(path, form(table))
        written.append(path)
    return written


def as_csv(table: Table) -> str:
    """One line per row, with columns for value, low, high and the paper's number, to four decimals. The last column
    contains the rows' notes, if any row has one."""
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
    """The text on one line. An apostrophe before a leading =, +, - or @ keeps a spreadsheet from reading a formula."""
    text = one_line(text)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip(" ").startswith(("=", "+", "-", "@")) else text
    return text


def as_markdown(table: Table) -> str:
    """Each cell has value and interval, then the paper's number. The best is bold, the second underlined (with <ins>,
    because GitHub drops <u>). A row's note follows its name in brackets."""
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
    """Escapes plain text for a cell of a Markdown table. An underscore inside a word needs no escape."""
    return re.sub(r"[\\`*|<~]|(?<!\w)_|_(?!\w)|\[(?=[^\]]*\]\()", r"\\\g<0>", one_line(text))


def one_line(text: str) -> str:
    """Replaces line breaks and other control characters with spaces."""
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", text)


def as_latex(table: Table) -> str:
    """booktabs. Below each row are a small line with its note and intervals, and one with the paper's numbers. Groups
    of columns that do not fit side by side go into further tabulars below."""
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
        for text, small in smaller:
            lines.append(f"{' & '.join([text, *([''] * (texts - 1)), *small])} \\\\")
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
    """Sets a signed number in math mode, so that its minus is not a hyphen."""
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
    """Escapes plain text for LaTeX. A leading bracket or star is put in braces: at the start of a row it would be read
    as an argument of the preceding line end."""
    escaped = "".join(_SPECIAL.get(letter, letter) for letter in one_line(text))
    return f"{{{escaped}}}" if escaped.startswith(("[", "*")) else escaped
