"""Writes the tables of README.md: table.py RESULTS.json (run.sh calls it)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")
MARKS = "<!-- tables -->\n", "<!-- end of tables -->"


def named(row: dict[str, Any]) -> str:
    anchor = f" → {row['anchor']}" if row["anchor"] else ""
    kept = f", kept: {', '.join(row['keep'])}" if row["keep"] else ""
    return f"{row['concept']}{anchor}{kept}"


def tables(rows: list[dict[str, Any]]) -> str:
    parts = []
    for question in dict.fromkeys(row["question"] for row in rows):
        lines = [
            f"**{question[0].upper()}{question[1:]}**",
            "",
            "| erased | prompts | images | original | VALERA | UCE |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for row in (row for row in rows if row["question"] == question):
            for place, group in enumerate(row["images"]):
                said = [
                    f"{row[system][group]:.0f}" if system in row else "–" for system in ("original", "valera", "uce")
                ]
                lines.append(
                    f"| {' | '.join([named(row) if not place else '', group, str(row['images'][group]), *said])} |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(results: str) -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    rows = json.loads(Path(results).read_text(encoding="utf-8"))["rows"]
    after = rest.partition(MARKS[1])[2]
    README.write_text(f"{before}{MARKS[0]}{tables(rows)}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
