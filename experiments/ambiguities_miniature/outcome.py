"""Writes the table of docs/ambiguities.md from the report's CSV file: outcome.py RUNS/tables/object-differences.csv"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "ambiguities.md"
MARKS = "<!-- outcome -->\n", "<!-- end of outcome -->"
MEASURES = {"h_o": "H_o", "acc_e": "Acc_e", "acc_g": "Acc_g", "acc_a": "Acc_a", "acc_s": "Acc_s"}


def main(table: Path) -> None:
    with table.open(encoding="utf-8", newline="") as file:
        found = {row["system"]: row for row in csv.DictReader(file)}
    heads = ["", "open in the paper", "ours", "the other way", *MEASURES.values()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in (HERE / "variants.txt").read_text(encoding="utf-8").splitlines()[1:]:
        label, number, question, ours, other, _ = line.split("|")
        if label in found:
            changes = [change(found[label], name) for name in MEASURES]
            lines.append(f"| {' | '.join([number.strip('-'), question, ours, other, *changes])} |")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}{chr(10).join(lines)}\n{MARKS[1]}{after}", encoding="utf-8")


def change(row: Mapping[str, str], name: str) -> str:
    """ "-1.2 [-2.0, -0.4]", in bold if the interval excludes 0 and the change is at least half a point."""
    value, low, high = (round(float(row[f"{name}{end}"]), 1) + 0 for end in ("", "_low", "_high"))  # no -0.0
    text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low * high > 0 and abs(value) >= 0.5 else text


if __name__ == "__main__":
    main(Path(sys.argv[1]))
