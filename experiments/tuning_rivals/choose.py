"""The best setting of every method that was searched, into README.md: choose.py (run.sh calls it)."""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
MARKS = "<!-- chosen -->\n", "<!-- end of chosen -->"


def main() -> None:
    lines = ["| method | of eight settings | H_o | all eight | Acc_e | Acc_g | Acc_s | Acc_a |", "|---" * 8 + "|"]
    for file in sorted(HERE.glob("*/results.json")):
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        rows.sort(key=lambda row: row["mean"]["h_o"]["value"])
        best = rows[-1]["mean"]
        values = {name: f"{e['value']:.1f}" for name, e in best.items()}
        own = f"{values['h_o']} [{best['h_o']['low']:.1f}, {best['h_o']['high']:.1f}]"
        all_of_them = ", ".join(f"{row['mean']['h_o']['value']:.0f}" for row in rows)
        setting = re.sub(r"method\.\w+\.", "", rows[-1]["system"])
        numbers = " | ".join(values[name] for name in ("acc_e", "acc_g", "acc_s", "acc_a"))
        lines.append(f"| {file.parent.name} | {setting} | {own} | {all_of_them} | {numbers} |")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}{chr(10).join(lines)}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
