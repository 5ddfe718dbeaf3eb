"""Prints the ratios of a results.json as a table: python experiments/bench/table.py RESULTS.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def rows(found: dict) -> list[tuple[str, str, str, str]]:
    """(name, our seconds, the reference's seconds, ratio). Ours is faster if the ratio is above 1 for the closed form,
    and below 1 for the other rows."""
    out = []
    for one in found.get("closed_form", ()):
        what = f"UCE, {one['names']:,} name{'s' * (one['names'] > 1)}, weights written"
        out.append((what, f"{one['ours_s']:.2f}", f"{one['loop_s']:.2f}, plain loop", f"{one['ratio']:.1f} x faster"))
    if part := found.get("sd14-float32"):
        step, draw = part["erase"], part["draw"]
        out.append(
            ("alignment step", f"{step['step_s']:.3f}", f"{step['bare_s']:.3f}, bare passes", f"{step['ratio']:.2f}")
        )
        what = f"drawing {draw['images']} images of {draw['steps']} steps"
        out.append(
            (what, f"{draw['seconds']:.2f}", f"{draw['diffusers_seconds']:.2f}, diffusers", f"{draw['ratio']:.2f}")
        )
    for name, measured in found.get("valera", {}).items():
        for one in measured:
            what = f"VALERA, {name}, {one['names']:,} name{'s' * (one['names'] > 1)}"
            seconds = one["text_s"] + one["edit_s"]
            out.append(
                (what, f"{seconds:.2f}", "", f"closed form {one['edit_s']:.2f} s, text states {one['text_s']:.2f} s")
            )
    for one in found.get("memory", ()):
        what = f"RealEra's closed form, mined, {one['concepts']:,} concepts"
        out.append((what, f"{one['seconds']:,.0f}", "", f"peak memory {one['peak_gb']:.1f} GB"))
    return out


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("| | seconds | reference, seconds | ratio |\n|---|---|---|---|")
    for row in rows(found):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
