"""Adds the tests' outcome and their measured differences to the results: differences.py LOGS RESULTS.json"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main(logs: str, results: str) -> None:
    file, folder = Path(results), Path(logs)
    known = json.loads(file.read_text()) if file.is_file() else {}
    lines = (folder / "differences.jsonl").read_text().splitlines()
    measured = {row.pop("test"): row for row in map(json.loads, lines)}
    suite = ElementTree.parse(folder / "tests.xml").getroot().find("testsuite")
    counts = (
        {} if suite is None else {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    )
    failed = [
        case.get("name")
        for case in ElementTree.parse(folder / "tests.xml").iter("testcase")
        if case.find("failure") is not None
    ]
    card = known.get("environment", {}).get("card")
    known["tests"] = {"card": card, **counts, "failed": failed, "differences": dict(sorted(measured.items()))}
    file.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(known["tests"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
