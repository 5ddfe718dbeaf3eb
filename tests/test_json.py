"""Every JSON that is written is JSON to a strict reader, whatever numbers came up."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import realera
from realera import costs, paths
from realera.contracts import Prompt, Verdict
from realera.evaluation.records import ManifestEntry, write_manifest, write_verdicts
from realera.files import plain_data
from realera.reporting.run_page import render

ROOT = Path(realera.__file__).parent
HIDDEN = {  # hashed, or said to another of our processes: whole numbers, times, texts
    "backbones/folder.py",
    "backbones/text_marks.py",
    "evaluation/generate.py",
    "reporting/sweep/systems.py",
    "judges/other_interpreter.py",
    "system/locks.py",
    "judges/worker.py",
    "methods/advunlearn.py",
    "methods/functional.py",
    "methods/inversion.py",
    "methods/inverted.py",
    "methods/latents.py",
    "methods/masks.py",
    "methods/replay.py",
    "methods/priors.py",
    "methods/stereo.py",
    "runs/folders.py",
    "sweeps/shared_model.py",
    "training/checkpoint.py",
    "training/seeding.py",
    "settings/values.py",
    "files/plain_data.py",
}


def strict(text: str) -> Any:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_without_a_word_in_json_are_null() -> None:
    content = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}, "d": True, math.inf: "x", 2: None}
    said = strict(plain_data.json_text(content, indent=1))
    assert said == {"a": [None, [None, 1.5]], "b": {"c": None}, "d": True, "null": "x", "2": None}


def test_no_other_way_to_write_json_is_taken() -> None:
    """json.dumps alone writes NaN. The workshop writes counts of its own."""
    found = set()
    for file in ROOT.rglob("*.py"):
        name = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and ast.unparse(node.value) == "json":
                found.add(name)
    assert {name for name in found if not name.startswith("miniature/")} - {"judges/miniature_net.py"} == HIDDEN


def test_data_in_a_page_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realera.reporting import run_page

    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.j2").write_text('<script type="application/json">{{ data|tojson }}</script>')
    monkeypatch.setattr(run_page, "__file__", str(tmp_path / "run_page.py"))
    page = render("x.j2", {"data": {"value": math.nan, "text": "</script>"}})
    (data,) = re.findall(r'json">(.*)</script>', page)
    assert strict(data) == {"value": None, "text": "</script>"}


def test_lines_and_costs(tmp_path: Path) -> None:
    prompt = Prompt("a", "a cat", "cat", "erase", 0, None, math.nan)
    write_manifest(tmp_path, [ManifestEntry(prompt, "images/a.png", "s")])
    write_verdicts(tmp_path / "v.jsonl", [Verdict("a", math.nan, "", {"score": math.nan, "top": [["x", math.inf]]})])
    meter = costs.Meter(tmp_path / paths.COSTS)
    meter.note(passes_per_image=math.inf)
    meter.write()
    for file in ("manifest.jsonl", "v.jsonl"):
        for line in (tmp_path / file).read_text().splitlines():
            strict(line)
    assert strict((tmp_path / paths.COSTS).read_text())["passes_per_image"] is None


def test_all_of_a_run_is_json(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    words = ["concept=airplane", "method.align.steps=2", "method.latents.images=2", "method.latents.batch=1"]
    monkeypatch.setattr(sys, "argv", ["train", *words, "run_dir=run", *small])
    import_module("realera.train").main()
    files = [file for file in (tmp_path / "run").rglob("*") if file.suffix in (".json", ".jsonl")]
    assert {"metrics.json", "edit.json", "costs.json", "losses.jsonl", "manifest.jsonl"} <= {f.name for f in files}
    for file in files:
        text = file.read_text(encoding="utf-8")
        for part in text.splitlines() if file.suffix == ".jsonl" else [text]:
            strict(part)
