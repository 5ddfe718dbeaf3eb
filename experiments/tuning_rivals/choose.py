"""Writes the best setting of every searched method into README.md, by task: choose.py [FOLDER] (run.sh calls it).

For objects, the setting with the highest mean H_o. On people and unsafe things several settings reach the ceiling, so
the choice has four steps: keep the settings within WITHIN points of the best H_o; of these, those that leave the most
images whole in the concept's place; of these, those within WITHIN points of the fewest object phrases left, because
only objects have phrases here that no table uses; of these, the setting whose preserved images moved least. (The runs
of objects are older than Whole_e and Moved_s.)
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
WITHIN = 1.0
TASKS = {"": "objects", "-celebrity": "people", "-nsfw": "unsafe things"}


def reading(row: dict[str, Any], mode: str, measure: str) -> float | None:
    said = row["by_mode"].get(mode, {}).get(measure)
    return None if said is None else float(said["value"])


def beside(row: dict[str, Any]) -> list[float | None]:
    """Whole_e and Moved_s."""
    return [reading(row, "whole", "acc_e"), reading(row, "moved", "acc_s")]


def phrases(method: str, ending: str, row: dict[str, Any]) -> float:
    """Acc_a of the objects with the same setting; 0 for a method that was not searched on objects. Unsafe things have
    twice the steps. A price of 10, which the objects' label of valera-rounds leaves out, is its default."""
    files = [HERE / name / "results.json" for name in (method, f"{method}-phrases")]
    found = [json.loads(file.read_text(encoding="utf-8"))["rows"] for file in files if file.is_file()]
    if not found:
        return 0.0
    known = {one["system"]: one["mean"]["acc_a"]["value"] for rows in found for one in rows}
    system = row["system"].removesuffix(" method.edit.price 10") if method == "valera-rounds" else row["system"]
    halved = re.sub(r"(steps )(\d+)", lambda found: f"{found[1]}{int(found[2]) // 2}", system)
    names = (system, halved) if ending == "-nsfw" else (system,)
    return next((known[name] for name in names if name in known), 0.0)


def best(rows: list[dict[str, Any]], method: str, ending: str) -> dict[str, Any]:
    """The chosen row. Sorts `rows` by H_o in place."""
    rows.sort(key=lambda row: row["mean"]["h_o"]["value"])
    level = [row for row in rows if row["mean"]["h_o"]["value"] >= rows[-1]["mean"]["h_o"]["value"] - WITHIN]
    if not ending or any(None in beside(row) for row in level):
        return rows[-1]

    whole = max(beside(row)[0] or 0.0 for row in level)
    level = [row for row in level if beside(row)[0] == whole]
    fewest = min(phrases(method, ending, row) for row in level)
    level = [row for row in level if phrases(method, ending, row) <= fewest + WITHIN]
    return min(level, key=lambda row: beside(row)[1] or 0.0)


def table(ending: str) -> list[str]:
    symbol = "Det" if ending == "-nsfw" else "Acc"
    also = ["Acc_a"] if not ending else ["Whole_e", "Moved_s"]
    heads = ["method", "of eight settings", "H_o", "all eight", f"{symbol}_e", f"{symbol}_g", "Acc_s", *also]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for file in sorted(HERE.glob("*/results.json")):
        method = file.parent.name.removesuffix(ending) if ending else file.parent.name
        if file.parent.name != method + ending or (not ending and method.endswith(("-celebrity", "-nsfw", "-phrases"))):
            continue
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        chosen = best(rows, method, ending)
        mean = chosen["mean"]
        own = f"{mean['h_o']['value']:.1f} [{mean['h_o']['low']:.1f}, {mean['h_o']['high']:.1f}]"
        all_of_them = ", ".join(f"{row['mean']['h_o']['value']:.0f}" for row in rows)
        setting = re.sub(r"guide\s*$", "guide ' '", re.sub(r"method\.\w+\.", "", chosen["system"]))
        numbers = [f"{mean[name]['value']:.1f}" for name in ("acc_e", "acc_g", "acc_s")]
        if ending:
            numbers += ["–" if said is None else f"{said:.1f}" for said in beside(chosen)]
        else:
            numbers.append(f"{mean['acc_a']['value']:.1f}")
        lines.append(f"| {method} | {setting} | {own} | {all_of_them} | {' | '.join(numbers)} |")
    return lines


def main() -> None:
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    for ending, name in TASKS.items():
        start, end = f"<!-- chosen {name} -->\n", f"<!-- end of chosen {name} -->"
        before, _, rest = text.partition(start)
        after = rest.partition(end)[2]
        if rest:
            text = f"{before}{start}{chr(10).join(table(ending))}\n{end}{after}"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
