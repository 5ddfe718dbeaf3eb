"""Writes every attack's settings and their success into README.md and results.json: choose.py RUNS (run.sh calls it).

The chosen setting has the highest ASR, the mean over the erased models; among equal ones the highest mean of the curve
of successes over the steps, so that the faster one wins; among those the fewest passes; among those the official one.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ATTACKS = "closed-form", "inversion", "unlearndiff", "p4d", "ring-a-bell", "mma", "relearn"
OFFICIAL = {"closed-form": "lambda_norm 0.1"}  # where it is in the grid
START, END = "<!-- chosen -->\n", "<!-- end of chosen -->"


def searched(runs: Path, attack: str) -> list[dict[str, Any]]:
    """The attack's settings from the best to the weakest: ASR in percent, by erased model too, and passes a prompt."""
    results: dict[str, list[dict[str, Any]]] = {}
    by_run: dict[str, dict[str, float]] = {}
    for file in sorted(runs.glob(f"*/attacks/{attack}-*.json")):
        results.setdefault(file.stem, []).append(json.loads(file.read_text(encoding="utf-8")))
        by_run.setdefault(file.stem, {})[file.parents[1].name] = results[file.stem][-1]["asr"]["value"]
    settings = {name: each[0]["protocol"]["attack"] for name, each in results.items()}
    keys = next(iter(settings.values()), {}).keys() - {"name"}
    differ = sorted(key for key in keys if len({repr(one[key]) for one in settings.values()}) > 1)
    rows = [
        {
            "setting": " ".join(f"{key} {settings[name][key]}" for key in differ),
            "asr": statistics.mean(one["asr"]["value"] for one in each),
            "curve": statistics.mean(statistics.mean(share for _, share in one["curve"]) for one in each),
            "passes": statistics.mean(one["cost"]["passes"] / one["prompts"] for one in each),
            "by_run": by_run[name],
        }
        for name, each in results.items()
    ]
    own = OFFICIAL.get(attack)
    return sorted(rows, key=lambda row: (-row["asr"], -row["curve"], row["passes"], row["setting"] != own))


def average(row: dict[str, Any], method: str) -> float:
    return statistics.mean(value for run, value in row["by_run"].items() if run.endswith(f"-{method}"))


def main() -> None:
    file = HERE / "results.json"
    tables = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    tables |= {attack: rows for attack in ATTACKS if (rows := searched(Path(sys.argv[1]), attack))}
    file.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    lines = ["| attack | best setting | ASR | UCE | VALERA | all settings' ASR | passes per prompt |", "|---" * 7 + "|"]
    for attack, rows in tables.items():
        best = rows[0]
        each = ", ".join(f"{row['asr']:.0f}" for row in rows)
        numbers = f"{best['asr']:.0f} | {average(best, 'uce'):.0f} | {average(best, 'valera'):.0f} | {each}"
        lines.append(f"| {attack} | {best['setting']} | {numbers} | {best['passes']:,.0f} |")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    text = f"{before}{START}{chr(10).join(lines)}\n{END}{rest.partition(END)[2]}"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
