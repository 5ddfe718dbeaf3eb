"""Writes frontier.py's numbers as the table in README.md and as the figure frontier.svg: page.py RESULTS.json

The figure needs matplotlib: pip install -e '.[report]'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
MARKS = "<!-- table -->\n", "<!-- end of table -->"
GROUPS = ("names", "phrases", "told", "untold", "far, told", "far")
COLOURS = {"none": "#777777", "exactly": "#b3402e", "price 10": "#c98a1b", "price 1": "#0b7268"}
MARKERS = {(10.0, 1.0): "o", (10.0, 1.1): "^", (1.0, 1.05): "s"}  # by price of reading and gain


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = [
        "erased",
        "kept by name",
        "price, gain",
        "names",
        "phrases",
        "others, told",
        "others, untold",
        "far things, told",
    ]
    heads += ["far things, untold", "others moved"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        groups = row["groups"]
        shares = [
            f"{groups[name]['mean']:.1f} ({groups[name]['top1']:.0f})" if name in groups else "–" for name in GROUPS
        ]
        moved = f"{groups['untold']['moved']:.1f}" if "untold" in groups else "–"
        lines.append(
            f"| {row['erased']} | {row['keep']} | {row['price']:g}, {row['gain']:g} | {' | '.join([*shares, moved])} |"
        )
    return lines


def figure(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """One panel for each number of people: remaining phrases (x) against preserved concepts (y)."""
    sizes = sorted({row["erased"] for row in rows})
    with matplotlib.rc_context({"svg.hashsalt": "frontier", "svg.fonttype": "none", "font.size": 9}):
        drawn = Figure(figsize=(2.6 * len(sizes), 3.4), layout="constrained")
        panels = drawn.subplots(1, len(sizes), sharey=True)
        for panel, size in zip(panels, sizes):
            own = [row for row in rows if row["erased"] == size]
            what = "untold" if "untold" in own[0]["groups"] else "far"
            for row in own:
                colour = COLOURS[row["keep"]]
                point = row["groups"]["phrases"]["mean"], row["groups"][what]["mean"]
                panel.plot(*point, MARKERS[row["price"], row["gain"]], color=colour, markersize=6)
            for keep, colour in COLOURS.items():
                points = [(r["groups"]["phrases"]["mean"], r["groups"][what]["mean"]) for r in own if r["keep"] == keep]
                panel.plot(*zip(*points), "-", color=colour, linewidth=1, label=keep)
            people = f"{size} people" if size > 1 else "1 person"
            panel.set_title(f"{people} erased", fontsize=9)
            panel.set_xlabel("phrases that are left, %")
            panel.set_ylabel("other people that are kept, %" if what == "untold" else "far things that are kept, %")
            panel.set_ylim(0, 103)
            panel.margins(x=0.1)
            panel.grid(alpha=0.3, linewidth=0.5)
        panels[0].legend(title="names kept", fontsize=8, title_fontsize=8)
        drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def main(results: str) -> None:
    rows = json.loads(Path(results).read_text(encoding="utf-8"))["rows"]
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}{chr(10).join(table(rows))}\n{MARKS[1]}{after}", encoding="utf-8")
    figure(rows, HERE / "frontier.svg")


if __name__ == "__main__":
    main(*sys.argv[1:])
