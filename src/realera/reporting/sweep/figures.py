"""The figures of a sweep as numbers: surfaces and lines over settings, each with its trends in a sentence, and cost
against H_o. The page draws them, and `plots` writes them as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from realera.evaluation.bootstrap import interval
from realera.evaluation.metrics import Sample
from realera.reporting.charts import Tick, number, ticks
from realera.reporting.sweep.chapter import Chapter
from realera.reporting.sweep.systems import Grid, grids, short_names, text_of
from realera.reporting.sweep.tables import cost_of
from realera.reporting.sweep.trends import Trend, sentence, together, trend
from realera.reporting.table_formats import Column

MEASURES = ("acc_e", "acc_s", "acc_g", "h_o")  # the four of the paper's figure 5
MOST_PAIRS = 6  # pairs of axes that have a surface
LEAST_FILLED = 0.5  # share of a grid with runs; below it the settings were searched, and a surface would have holes
LEAST_RANGE = 1.0  # of an axis, in points
# viridis at equal steps: lightness increases with the value, also in grey and for colour-blind readers
COLOURS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")


@dataclass(frozen=True)
class DescribedTrend:
    """A trend of a grid, with the texts of its sentence. axis, symbol: names of axis and measure; ends: first and last
    value of the axis."""

    grid: str
    trend: Trend
    axis: str
    symbol: str
    ends: tuple[str, str]
    digits: int = 1

    @property
    def sentence(self) -> str:
        return sentence(self.trend, self.axis, self.symbol, self.ends, self.digits)


@dataclass(frozen=True)
class Surface:
    """A measure over two settings. values[j][i]: (value, low, high) at x[i], y[j], None without a run."""

    name: str
    column: Column
    axes: tuple[str, str]
    x: tuple[str, ...]
    y: tuple[str, ...]
    values: tuple[tuple[tuple[float, float, float] | None, ...], ...]
    trends: tuple[DescribedTrend, ...]

    @property
    def span(self) -> tuple[float, float]:
        return _widened([cell[0] for line in self.values for cell in line if cell])

    @property
    def marks(self) -> list[float]:
        return ticks(*_widened([edge for line in self.values for cell in line if cell for edge in cell]), 6)

    def colour(self, value: float) -> str:
        return colour(value, *self.span)

    def bright(self, value: float) -> bool:
        """Whether black text has a higher contrast than white on this value's colour, by the relative luminance of WCAG
        2. The higher of the two is at least 4.5, which WCAG asks for, on every colour."""
        parts = (int(self.colour(value)[k : k + 2], 16) / 255 for k in (1, 3, 5))
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        return (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05)

    @property
    def data(self) -> dict[str, Any]:
        """The JSON that the page's script draws."""
        label = f"{self.column.symbol}_{self.column.index}"
        return {
            "x": {"name": self.axes[0], "labels": self.x},
            "y": {"name": self.axes[1], "labels": self.y},
            "z": {"name": label, "ticks": [(mark, number(mark)) for mark in self.marks]},
            "values": self.values,
            "span": self.span,
            "colours": COLOURS,
            "digits": self.column.digits,
        }


@dataclass(frozen=True)
class Line:
    """A measure over one setting. points: (value, low, high) at each of x."""

    name: str
    column: Column
    axis: str
    x: tuple[str, ...]
    points: tuple[tuple[float, float, float], ...]
    trends: tuple[DescribedTrend, ...]

    @property
    def marks(self) -> list[float]:
        known = [edge for point in self.points for edge in point]
        return ticks(*_widened(known), 4)

    def at(self, value: float) -> float:
        """Position of a value in percent from the top."""
        low, high = self.marks[0], self.marks[-1]
        return 100 * (high - value) / (high - low)

    def across(self, i: int) -> float:
        return 100 * (i + 0.5) / len(self.x)

    @property
    def polyline(self) -> str:
        return " ".join(f"{self.across(i):.2f},{self.at(p[0]):.2f}" for i, p in enumerate(self.points))

    @property
    def band(self) -> str:
        upper = [f"{self.across(i):.2f},{self.at(p[2]):.2f}" for i, p in enumerate(self.points)]
        lower = [f"{self.across(i):.2f},{self.at(p[1]):.2f}" for i, p in enumerate(self.points)]
        return " ".join([*upper, *reversed(lower)])

    @property
    def frame(self) -> tuple[list[Tick], list[Tick]]:
        x = [Tick(self.across(i), label) for i, label in enumerate(self.x)]
        return x, [Tick(self.at(mark), number(mark)) for mark in self.marks]


@dataclass(frozen=True)
class Family:
    """The figures of one grid over the same axes, one per measure."""

    title: str
    note: str
    figures: tuple[Surface | Line, ...]


@dataclass(frozen=True)
class Dot:
    """A system's cost to erase and H_o. x, y, low, high: percent of the plot, y from the top."""

    system: str
    seconds: float
    h_o: tuple[float, float, float]
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Scatter:
    name: str
    dots: tuple[Dot, ...]
    x: list[Tick]
    y: list[Tick]


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, at least `LEAST_RANGE` wide, so that negligible differences stay invisible."""
    low, high = min(values), max(values)
    if high - low >= LEAST_RANGE:
        return low, high
    start = max(0.0, (low + high - LEAST_RANGE) / 2) if low >= 0 else (low + high - LEAST_RANGE) / 2
    return start, start + LEAST_RANGE


def colour(value: float, low: float, high: float) -> str:
    """The colour of a value, interpolated in COLOURS: "#rrggbb"."""
    place = (value - low) / (high - low) * (len(COLOURS) - 1) if high > low else (len(COLOURS) - 1) / 2
    first = min(int(place), len(COLOURS) - 2)
    share = place - first
    ends = [[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in COLOURS[first : first + 2]]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*ends))


def families(chapter: Chapter, typed: Sequence[str] = ()) -> list[Family]:
    """Lines for a grid of one setting; for more settings, a surface per pair, averaged over the other settings."""
    found: list[Family] = []
    for count, grid in enumerate(grids(chapter.runs, typed), 1):
        if grid.filled < LEAST_FILLED:
            continue
        measured = {at: chapter.measure(runs) for at, runs in grid.cells.items()}
        name = f"{chapter.name}-grid{count}" if count > 1 else f"{chapter.name}-grid"
        short = short_names(list(grid.axes))
        there = {m for samples in measured.values() for m, sample in samples.items() if not math.isnan(sample.value)}
        names = [measure for measure in MEASURES if measure in there]
        if not names:
            continue
        trends = {measure: _trends(chapter, name, grid, measured, measure, short) for measure in names}
        columns = {column.key: column for column in chapter.columns(names)}
        pairs = list(combinations(grid.axes, 2))
        if not pairs:
            (axis,) = grid.axes
            lines = [_line(f"{name}-{m}", columns[m], short[axis], grid, measured, m, trends[m]) for m in names]
            found.append(Family(f"{grid.title}: {short[axis]}", "", tuple(lines)))
        for x, y in pairs[:MOST_PAIRS]:
            stem = name if len(pairs) == 1 else f"{name}-{short[x]}-{short[y]}"
            surfaces = [_surface(f"{stem}-{m}", columns[m], (x, y), short, grid, measured, m, trends[m]) for m in names]
            others = [short[axis] for axis in grid.axes if axis not in (x, y)]
            note = f"Means over {', '.join(others)}." if others else ""
            found.append(Family(f"{grid.title}: {short[x]} and {short[y]}", note, tuple(surfaces)))
    return found


def corrected(found: Sequence[Sequence[Family]]) -> tuple[list[list[Family]], int]:
    """(the families of all chapters of a page with their trends corrected for their number, that number)."""
    before = list(dict.fromkeys(one for part in found for family in part for f in family.figures for one in f.trends))
    after = dict(zip(before, together([one.trend for one in before])))

    def with_corrected(figure: Surface | Line) -> Surface | Line:
        return replace(figure, trends=tuple(replace(one, trend=after[one]) for one in figure.trends))

    return [
        [replace(family, figures=tuple(map(with_corrected, family.figures))) for family in part] for part in found
    ], len(before)


def _trends(
    chapter: Chapter,
    name: str,
    grid: Grid,
    measured: Mapping[tuple[float, ...], Mapping[str, Sample]],
    measure: str,
    short: Mapping[str, str],
) -> tuple[DescribedTrend, ...]:
    column = chapter.columns([measure])[0]
    cells = {at: samples[measure] for at, samples in measured.items() if measure in samples}
    found = []
    for axis, values in grid.axes.items():
        one = trend(grid.axes, cells, axis, measure, step=10.0**-column.digits)
        if one is not None:
            ends = text_of(values[0]), text_of(values[-1])
            found.append(DescribedTrend(name, one, short[axis], f"{column.symbol}_{column.index}", ends, column.digits))
    return tuple(found)


def _line(
    name: str,
    column: Column,
    short: str,
    grid: Grid,
    measured: Mapping[tuple[float, ...], Mapping[str, Sample]],
    measure: str,
    trends: tuple[DescribedTrend, ...],
) -> Line:
    known = [(at[0], measured[at][measure]) for at in sorted(measured) if measure in measured[at]]
    known = [(value, sample) for value, sample in known if not math.isnan(sample.value)]
    points = tuple(_point([sample]) for _, sample in known)
    return Line(name, column, short, tuple(text_of(value) for value, _ in known), points, trends)


def _surface(
    name: str,
    column: Column,
    axes: tuple[str, str],
    short: Mapping[str, str],
    grid: Grid,
    measured: Mapping[tuple[float, ...], Mapping[str, Sample]],
    measure: str,
    trends: tuple[DescribedTrend, ...],
) -> Surface:
    place = [list(grid.axes).index(axis) for axis in axes]
    at: dict[tuple[float, float], list[Sample]] = {}
    for values, samples in measured.items():
        if measure in samples and not math.isnan(samples[measure].value):
            at.setdefault((values[place[0]], values[place[1]]), []).append(samples[measure])
    x, y = (grid.axes[axis] for axis in axes)
    table = tuple(tuple(_point(at[i, j]) if (i, j) in at else None for i in x) for j in y)
    labels = tuple(map(text_of, x)), tuple(map(text_of, y))
    return Surface(name, column, (short[axes[0]], short[axes[1]]), *labels, table, trends)


def _point(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """The mean over cells, with its interval."""
    drawn = torch.stack([sample.drawn for sample in samples]).mean(dim=0)
    low, high = samples[0].interval() if len(samples) == 1 else interval(drawn)
    return sum(sample.value for sample in samples) / len(samples), low, high


def scatter(chapter: Chapter) -> Scatter | None:
    """Seconds to erase against H_o, one dot per system; None if fewer than two systems have both."""
    costs = {system: cost_of(runs).get("seconds", 0) for system, runs in chapter.systems.items()}
    known = [
        (system, seconds, _point([chapter.means[system]["h_o"]]))
        for system, seconds in costs.items()
        if seconds > 0 and "h_o" in chapter.measures and not math.isnan(chapter.means[system]["h_o"].value)
    ]
    if len(known) < 2:
        return None
    most, least = max(s for _, s, _ in known), min(s for _, s, _ in known)
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    marks = [10.0**power for power in powers] if most > 20 * least else ticks(0, most, 5)
    edges = [edge for _, _, point in known for edge in point]
    rows = ticks(min(edges), max(edges), 5)

    def across(seconds: float) -> float:
        if most > 20 * least:
            return 100 * (math.log10(seconds) - powers[0]) / (powers[-1] - powers[0])
        return 100 * seconds / marks[-1]

    def down(value: float) -> float:
        return 100 * (rows[-1] - value) / (rows[-1] - rows[0])

    dots = tuple(
        Dot(system, seconds, point, across(seconds), down(point[0]), down(point[1]), down(point[2]))
        for system, seconds, point in sorted(known, key=lambda dot: dot[1])
    )
    return Scatter(
        f"{chapter.name}-cost",
        dots,
        [Tick(across(mark), f"{number(mark)} s") for mark in marks],
        [Tick(down(mark), number(mark)) for mark in rows],
    )
