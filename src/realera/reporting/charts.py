"""The report's charts as numbers: positions of marks, ticks and labels in percent of the plot. The template draws them.

Percent, not pixels, so that a chart fills any screen and its text keeps its size. x points right, y points down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_MOST_POINTS = 240  # of a curve; a plot is hardly wider in pixels


@dataclass(frozen=True)
class Tick:
    """A label on an axis. at: percent from the axis' start."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """One loss term: `raw` and `smooth` are the points of polylines in a 100 x 100 box."""

    title: str
    raw: str
    smooth: str
    last: str
    x: list[Tick]
    y: list[Tick]


@dataclass(frozen=True)
class Bar:
    """A bar from the bottom: left edge, width and height in percent."""

    x: float
    width: float
    height: float
    kind: str
    title: str


@dataclass(frozen=True)
class Bars:
    bars: list[Bar]
    groups: list[Tick]
    y: list[Tick]


@dataclass(frozen=True)
class Dots:
    """Points in order. unchanged: height of the line for an unchanged direction."""

    points: list[tuple[float, float]]
    unchanged: float
    near_unchanged: int  # number of points within one percent of that line
    x: list[Tick]
    y: list[Tick]


@dataclass(frozen=True)
class Shift:
    """The shift of one prompt. at: percent of the axis. label: the number. before, after: cosines to the anchor, if
    known."""

    text: str
    at: float
    label: str
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class Shifts:
    """Prompts by split, in the order of the splits, on one axis."""

    groups: dict[str, list[Shift]] = field(default_factory=dict)
    x: list[Tick] = field(default_factory=list)
    cosines: bool = False  # whether the axis is the cosine to the anchor instead of the size of the shift


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) whose range includes low and high."""
    span = (high - low) or abs(high) or 1.0
    rough = span / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A short decimal: "0.25", "1200", "3.1e-05"."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """One curve per term of losses.jsonl. A term may be missing at some steps. y starts at 0."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    found = []
    for name in names:
        points = [(float(r["step"]), float(r[name])) for r in rows if _finite(r.get(name)) and _finite(r.get("step"))]
        if len(points) > 1:
            found.append(_curve(name, points))
    return found


def _curve(name: str, points: list[tuple[float, float]]) -> Curve:
    steps = [step for step, _ in points]
    marks = ticks(min(0.0, *(v for _, v in points)), max(v for _, v in points), 4)
    low, high = marks[0], marks[-1]
    first, width = steps[0], (steps[-1] - steps[0]) or 1.0

    def line(values: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{100 * (s - first) / width:.2f},{100 * (high - v) / (high - low):.2f}" for s, v in values)

    smooth = _smooth(points)
    return Curve(
        title=name.replace("_", " "),
        raw=line(_thin(points)),
        smooth=line(_thin(smooth)),
        last=number(smooth[-1][1]),
        x=[Tick(0, f"{steps[0]:.0f}"), Tick(100, f"step {steps[-1]:.0f}")],
        y=[Tick(100 * (high - m) / (high - low), number(m)) for m in marks],
    )


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean over a tenth of the steps, centred to avoid lag."""
    half = max(1, len(points) // 20)
    values = [v for _, v in points]
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(step, sum(w) / len(w)) for (step, _), w in zip(points, windows)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every n-th point, and always the last one."""
    if len(points) <= _MOST_POINTS:
        return points
    every = math.ceil(len(points) / _MOST_POINTS)
    return [*points[:-1:every], points[-1]]


def layer_bars(layers: Mapping[str, float]) -> Bars:
    """Relative change per layer in U-Net order, keys next to values, grouped by U-Net block."""
    marks = ticks(0, max([0.0, *(v for v in layers.values() if _finite(v))]) or 1.0, 3)
    slot = 100 / max(1, len(layers))
    bars: list[Bar] = []
    groups: dict[str, list[float]] = {}
    for i, (name, value) in enumerate(layers.items()):
        kind = "value" if name.endswith("to_v") else "key"
        height = 100 * value / marks[-1] if _finite(value) else 0.0
        # a key bar is moved right and its value bar left, so that the pair of an attention layer is together
        x = slot * (i + (0.18 if kind == "key" else 0.04))
        bars.append(Bar(x, slot * 0.78, height, kind, f"{name}: {_percent(value)}"))
        groups.setdefault(_block(name), []).append(slot * (i + 0.5))
    return Bars(
        bars,
        [Tick(sum(at) / len(at), name) for name, at in groups.items()],
        [Tick(100 - 100 * m / marks[-1], f"{100 * m:g}%") for m in marks],
    )


def _block(layer: str) -> str:
    """ "down 1", "mid", "up 2" for a diffusers name; "" for any other name."""
    found = re.search(r"(down|up)_blocks\.(\d+)", layer)
    return f"{found[1]} {found[2]}" if found else "mid" if "mid_block" in layer else ""


def spectrum(values: Sequence[float]) -> Dots:
    """Singular values of the map, largest first; 1 = an unchanged direction."""
    ordered = sorted((float(v) for v in values if _finite(v)), reverse=True)
    marks = ticks(0, max([1.0, *ordered]), 4)
    high = marks[-1]
    last = max(1, len(ordered) - 1)
    return Dots(
        [(100 * i / last, 100 * (high - v) / high) for i, v in enumerate(ordered)],
        100 * (high - 1) / high,
        sum(abs(v - 1) <= 0.01 for v in ordered),
        [Tick(0, "1"), Tick(100, f"{len(ordered)}")],
        [Tick(100 * (high - m) / high, number(m)) for m in marks],
    )


def shifts(probes: Sequence[Mapping[str, Any]]) -> Shifts:
    """The shifts of prompts. The axis is the cosine to the anchor if every probe has it (to_anchor_before,
    to_anchor_after), else the relative size of the shift."""
    probes = [p for p in probes if _finite(p.get("shift"))]
    cosines = bool(probes) and all(
        _finite(p.get("to_anchor_before")) and _finite(p.get("to_anchor_after")) for p in probes
    )
    if cosines:
        ends = [p[key] for p in probes for key in ("to_anchor_before", "to_anchor_after")]
        marks = ticks(min(0.0, *ends), 1.0, 5)
    else:
        marks = ticks(0, max([0.0, *(p["shift"] for p in probes)]) or 1.0, 5)
    low, width = marks[0], marks[-1] - marks[0]

    def at(value: float) -> float:
        return 100 * (value - low) / width

    groups: dict[str, list[Shift]] = {}
    for p in probes:
        ends = [at(p["to_anchor_before"]), at(p["to_anchor_after"])] if cosines else []
        where = ends[1] if cosines else at(p["shift"])
        groups.setdefault(str(p.get("split", "")), []).append(Shift(str(p["text"]), where, _percent(p["shift"]), *ends))
    return Shifts(groups, [Tick(at(m), number(m) if cosines else f"{100 * m:g}%") for m in marks], cosines)


def _percent(value: float) -> str:
    """ "43%", "4.1%", "0.025%"."""
    if not _finite(value):
        return "?"
    return f"{100 * value:.0f}%" if abs(value) >= 0.0995 else f"{100 * value:.2g}%"


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
