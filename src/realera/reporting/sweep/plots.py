"""Writes the figures of a sweep as PNG and SVG files with matplotlib (the extra `report`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from realera.reporting.charts import number
from realera.reporting.sweep.figures import COLOURS, Line, Scatter, Surface
from realera.system import disk

DPI = 200  # of the PNGs
NAMED, LINE = 8, 0.16  # lines of names that fit below a scatter; inches to add for each further line
INK, BAND = "#0b7268", "#0b726833"


def available() -> bool:
    """Whether matplotlib is installed. The rest of a sweep's report does not need it."""
    return importlib.util.find_spec("matplotlib") is not None


def write(figure: Surface | Line | Scatter, folder: Path) -> list[Path]:
    """Writes folder/<name>.png and .svg and returns their paths. The same numbers make identical files."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": figure.name, "svg.fonttype": "none", "font.size": 9}):
        wide, tall = (8.6, 3.8) if isinstance(figure, Surface) else (4.6, 3.4)
        tall += LINE * max(0, _names(figure)[1] - NAMED) if isinstance(figure, Scatter) else 0
        drawn = Figure(figsize=(wide, tall), layout="constrained")
        FigureCanvasAgg(drawn)
        if isinstance(figure, Surface):
            _surface(drawn, figure)
        elif isinstance(figure, Line):
            _line(drawn, figure)
        else:
            _scatter(drawn, figure)
        written = []
        for kind in ("png", "svg"):
            path = folder / f"{figure.name}.{kind}"
            with disk.atomic(path) as beside:
                stamp = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
                drawn.savefig(beside, format=kind, dpi=DPI, metadata=stamp)
            written.append(path)
    return written


def _surface(drawn: Any, figure: Surface) -> None:
    """On the left the surface with its intervals, on the right a heat map with the same numbers."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("values", list(COLOURS))
    low, high = figure.span
    values = np.array([[cell[0] if cell else np.nan for cell in line] for line in figure.values])
    x, y = np.meshgrid(np.arange(len(figure.x)), np.arange(len(figure.y)))

    space = drawn.add_subplot(1, 2, 1, projection="3d")
    middle = np.pad((values[:-1, :-1] + values[1:, :-1] + values[:-1, 1:] + values[1:, 1:]) / 4, (0, 1))
    faces = colours(np.nan_to_num((middle - low) / (high - low)))  # the colour of a face is the mean of its corners
    faces[..., 3] = np.where(np.isnan(middle), 0, 0.92)  # a face with a missing corner is transparent
    space.plot_surface(x, y, values, facecolors=faces, rstride=1, cstride=1, shade=False)
    for j, line in enumerate(figure.values):
        for i, cell in enumerate(line):
            if cell:
                space.plot([i, i], [j, j], [cell[1], cell[2]], color="#00000088", linewidth=0.8)
    _axes(space, figure)
    space.set_zlim(figure.marks[0], figure.marks[-1])
    space.view_init(elev=28, azim=-50)

    heat = drawn.add_subplot(1, 2, 2)
    heat.imshow(values, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto")
    for j, line in enumerate(figure.values):
        for i, cell in enumerate(line):
            if cell:
                ink = "black" if (cell[0] - low) / (high - low) > 0.55 else "white"
                text = f"{figure.column.text(cell[0])}\n[{figure.column.text(cell[1])}, {figure.column.text(cell[2])}]"
                heat.text(i, j, text, ha="center", va="center", fontsize=5.5, color=ink)
    _axes(heat, figure)
    drawn.suptitle(_label(figure), fontsize=10)


def _axes(axes: Any, figure: Surface) -> None:
    axes.set_xticks(range(len(figure.x)), figure.x)
    axes.set_yticks(range(len(figure.y)), figure.y)
    axes.set_xlabel(figure.axes[0])
    axes.set_ylabel(figure.axes[1])


def _line(drawn: Any, figure: Line) -> None:
    axes = drawn.add_subplot()
    places = range(len(figure.x))
    axes.fill_between(places, [p[1] for p in figure.points], [p[2] for p in figure.points], color=BAND, linewidth=0)
    axes.plot(places, [p[0] for p in figure.points], color=INK, marker="o", markersize=4)
    axes.set_xticks(places, figure.x)
    axes.set_xlabel(figure.axis)
    axes.set_ylabel(_label(figure))
    axes.set_ylim(figure.marks[0], figure.marks[-1])
    axes.grid(axis="y", linewidth=0.4)


def _scatter(drawn: Any, figure: Scatter) -> None:
    axes = drawn.add_subplot()
    seconds = [dot.seconds for dot in figure.dots]
    for count, dot in enumerate(figure.dots, 1):
        value, low, high = dot.h_o
        axes.plot([dot.seconds, dot.seconds], [low, high], color=BAND, linewidth=1)
        # matplotlib omits legend names that begin with an underscore: a zero-width space before it prevents that
        label = "\u200b" * dot.system.startswith("_") + dot.system.replace("$", r"\$")
        axes.plot(
            [dot.seconds],
            [value],
            color=INK,
            marker=f"${count}$",
            markeredgewidth=0,
            markersize=4 + 3 * len(str(count)),
            label=label,
            ls="",
        )
    if max(seconds) > 20 * min(seconds):
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_xlabel("seconds to erase")
    axes.set_ylabel("$\\mathrm{H}_{o}$")
    axes.grid(linewidth=0.4)
    drawn.legend(loc="outside lower left", ncols=_names(figure)[0], fontsize=7, frameon=False)


def _names(figure: Scatter) -> tuple[int, int]:
    """(columns, lines) of the systems' names below the plot."""
    across = max(1, min(4, 60 // max(len(dot.system) for dot in figure.dots)))
    return across, -(-len(figure.dots) // across)


def _label(figure: Surface | Line) -> str:
    column = figure.column
    return f"$\\mathrm{{{column.symbol}}}_{{{column.index}}}$" + (f" {column.arrow}" if column.arrow else "")
