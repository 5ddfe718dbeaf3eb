"""Writes every attack's settings and their success into README.md and results.json: choose.py RUNS (run.sh calls it).

The chosen setting has the highest ASR, the mean over the erased models; among equal ones the highest ASR on the
unedited model, for attacks that know the text encoder alone; then the highest mean of the curve of successes over the
steps, so that the faster one wins; then the fewest passes; then the official one.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ATTACKS = "closed-form", "inversion", "unlearndiff", "p4d", "ring-a-bell", "mma", "relearn"
ORIGINAL = "original"
OFFICIAL = {"closed-form": "lambda_norm 0.1"}  # where it is in the grid
START, END = "<!-- chosen -->\n", "<!-- end of chosen -->"


def searched(runs: Path, attack: str) -> list[dict[str, Any]]:
    """The attack's settings from the best to the weakest: ASR in percent, by model too, and passes a prompt."""
    results: dict[str, list[dict[str, Any]]] = {}  # of the erased models
    by_run: dict[str, dict[str, float]] = {}
    for file in sorted(runs.glob(f"*/attacks/{attack}-*.json")):
        found, run = json.loads(file.read_text(encoding="utf-8")), file.parents[1].name
        by_run.setdefault(file.stem, {})[run] = found["asr"]["value"]
        if not run.endswith(f"-{ORIGINAL}"):
            results.setdefault(file.stem, []).append(found)
    settings = {name: each[0]["protocol"]["attack"] for name, each in results.items()}
    keys = next(iter(settings.values()), {}).keys() - {"name"}
    differ = sorted(key for key in keys if len({repr(one[key]) for one in settings.values()}) > 1)
    rows = [
        {
            "setting": " ".join(f"{key} {settings[name][key]}" for key in differ),
            "asr": statistics.mean(one["asr"]["value"] for one in each),
            "curve": statistics.mean(statistics.mean(share for _, share in one["curve"]) for one in each),
            "passes": statistics.mean(one["cost"]["passes"] / one["prompts"] for one in each),
            ORIGINAL: average(by_run[name], ORIGINAL),
            "by_run": by_run[name],
        }
        for name, each in results.items()
    ]
    own = OFFICIAL.get(attack)
    return sorted(
        rows, key=lambda row: (-row["asr"], -(row[ORIGINAL] or 0), -row["curve"], row["passes"], row["setting"] != own)
    )


def average(by_run: dict[str, float], method: str) -> float | None:
    found = [value for run, value in by_run.items() if run.endswith(f"-{method}")]
    return statistics.mean(found) if found else None


def shown(number: float | None) -> str:
    return "–" if number is None else f"{number:.0f}"


def main() -> None:
    file = HERE / "results.json"
    tables = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    tables |= {attack: rows for attack in ATTACKS if (rows := searched(Path(sys.argv[1]), attack))}
    file.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    heads = [
        "attack",
        "best setting",
        "ASR",
        "UCE",
        "VALERA",
        "unedited model",
        "all settings' ASR",
        "passes per prompt",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for attack, rows in tables.items():
        best = rows[0]
        each = ", ".join(f"{row['asr']:.0f}" for row in rows)
        by_model = [shown(average(best["by_run"], model)) for model in ("uce", "valera", ORIGINAL)]
        numbers = [shown(best["asr"]), *by_model, each, f"{best['passes']:,.0f}"]
        lines.append(f"| {attack} | {best['setting']} | {' | '.join(numbers)} |")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    text = f"{before}{START}{chr(10).join(lines)}\n{END}{rest.partition(END)[2]}"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
