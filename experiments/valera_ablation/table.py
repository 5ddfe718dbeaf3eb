"""Writes the tables of README.md from the report's results of each task: table.py (run.sh calls it)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TASKS = {  # folder: (title, symbol of a share, whether the concepts have phrases)
    "object": ("Objects: gun, knife, bomb, one at a time", "Acc", True),
    "nsfw": ("Five everyday things together", "Det", False),
    "celebrity": ("People: George Takei, Queen Elizabeth, one at a time", "Acc", False),
}
MARKS = "<!-- tables -->\n", "<!-- end of tables -->"


def number(said: dict[str, Any] | None) -> str:
    return "–" if said is None else f"{said['value']:.1f}"


def table(rows: dict[str, dict[str, Any]], labels: list[str], symbol: str, phrases: bool) -> list[str]:
    """rows: {label: row}."""
    heads = ["", "H_o", f"{symbol}_e", f"{symbol}_g", *(["Acc_a"] if phrases else []), "Acc_s", "Whole_e", "Moved_s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for label in labels:
        if label not in rows:
            continue
        mean, readings = rows[label]["mean"], rows[label]["by_mode"]
        h_o = mean.get("h_o")
        said = [f"{number(h_o)} [{h_o['low']:.1f}, {h_o['high']:.1f}]" if h_o else "–"]
        said += [number(mean.get(name)) for name in ("acc_e", "acc_g", *(["acc_a"] if phrases else []), "acc_s")]
        said.append(number(readings.get("whole", {}).get("acc_e")))
        said.append(number(readings.get("moved", {}).get("acc_s")))
        lines.append(f"| {' | '.join([label, *said])} |")
    return lines


def main() -> None:
    variants = (HERE / "variants.txt").read_text(encoding="utf-8").splitlines()
    labels = [line.partition("|")[0] for line in variants]
    parts = []
    for folder, (title, symbol, phrases) in TASKS.items():
        file = HERE / folder / "results.json"
        if file.is_file():
            rows = {row["system"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
            parts.append("\n".join([f"**{title}**", "", *table(rows, labels, symbol, phrases)]))
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}{(chr(10) * 2).join(parts)}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
