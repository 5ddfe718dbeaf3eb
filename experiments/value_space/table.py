"""Writes observe.py's numbers as a table into a README, between its marks: table.py RESULTS.json README.md"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MARKS = "<!-- observation -->\n", "<!-- end of observation -->"
COLUMNS = [
    ("objects: synonyms", "object", "synonyms"),
    ("objects: phrases", "object", "phrases"),
    ("people: phrases", "celebrity", "phrases"),
    ("artists: phrases", "style", "phrases"),
    ("unsafe: synonyms", "nsfw", "synonyms"),
    ("unsafe: phrases", "nsfw", "phrases"),
]


def main(results: str, readme: str) -> None:
    tasks = json.loads(Path(results).read_text(encoding="utf-8"))["tasks"]
    spaces = list(dict.fromkeys(space for each in tasks.values() for space in each))
    together = [space for space in spaces if "blocks" not in space and "mid_block" not in space]
    lines = [f"| similarity in | {' | '.join(name for name, _, _ in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for space in together:
        numbers = [tasks.get(task, {}).get(space, {}).get(kind, {}).get("auc") for _, task, kind in COLUMNS]
        lines.append(f"| {space} | {' | '.join('–' if n is None else f'{n:.2f}' for n in numbers)} |")
    text = Path(readme).read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    Path(readme).write_text(f"{before}{MARKS[0]}{chr(10).join(lines)}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
