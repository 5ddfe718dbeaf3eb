"""The pooled table as a command writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from realera import paths
from realera.contracts import Prompt, UserError, Verdict
from realera.evaluation.records import ManifestEntry, verdict_file, write_manifest, write_verdicts
from realera.evaluation.results import measure
from realera.reporting.table import MARKS, write_results
from realera.system import disk


def run(folder: Path, label: str, seed: int, erased: float, judge: str = "eye") -> Path:
    """A judged run with one image per split; acc_e and acc_g are the probability `erased`."""
    disk.write_text(folder / paths.CONFIG, yaml.safe_dump({"concept": "cat", "seed": seed, "label": label}))
    splits = {"erase": ("cat", erased), "near": ("cat", erased), "keep": ("dog", 0.9)}
    prompts = [Prompt(split, "a photo", concept, split, 0) for split, (concept, _) in splits.items()]  # type: ignore[arg-type]
    write_manifest(folder, [ManifestEntry(prompt, f"images/{prompt.id}.png", "x") for prompt in prompts])
    verdicts = [Verdict(prompt.id, splits[prompt.split][1], "dog") for prompt in prompts]
    write_verdicts(verdict_file(folder, judge), verdicts)
    measure(folder, judge, {"judge": {"judge": judge}})
    return folder


def test_judged_runs_are_pooled_by_label_and_the_readme_is_filled(tmp_path: Path) -> None:
    folders = [
        run(tmp_path / f"{label}{seed}", label, seed, 0.2 * (label == "a") + 0.1 * seed)
        for label in "ab"
        for seed in (0, 1)
    ]
    (tmp_path / "unfinished").mkdir()
    claim = tmp_path / "claim"
    disk.write_text(claim / "README.md", f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    for _ in range(2):  # writing again gives the same file
        out = write_results([*folders, tmp_path / "unfinished"], claim)
        results = json.loads(out.read_text(encoding="utf-8"))
        assert [row["system"] for row in results["rows"]] == ["a", "b"] and results["judge"] == "eye"
        assert [row["mean"]["acc_e"]["value"] for row in results["rows"]] == [25.0, 5.0]
        readme = (claim / "README.md").read_text(encoding="utf-8")
        assert readme.startswith(f"before\n{MARKS[0]}\n| system |") and readme.endswith(f"|\n{MARKS[1]}\nafter\n")
        assert "old" not in readme


def test_a_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    disk.write_text(tmp_path / "README.md", f"no end to {MARKS[0]} here")
    write_results([run(tmp_path / "a", "a", 0, 0.1)], tmp_path)
    assert (tmp_path / "README.md").read_text() == f"no end to {MARKS[0]} here"


def test_runs_of_different_protocols_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none"):
        write_results([tmp_path], tmp_path)
    two = [run(tmp_path / "a", "a", 0, 0.1), run(tmp_path / "b", "b", 0, 0.1, judge="other")]
    with pytest.raises(UserError, match="one judge"):
        write_results(two, tmp_path)


def test_systems_with_different_settings_have_separate_rows(tmp_path: Path) -> None:
    folders = [run(tmp_path / name, "ours", 0, erased) for name, erased in (("a", 0.1), ("b", 0.3), ("c", 0.5))]
    systems = {folders[1]: "ours, d1 5", folders[0]: "ours, d1 10"}
    results = json.loads(write_results(folders, tmp_path, systems).read_text(encoding="utf-8"))
    assert [(row["system"], row["mean"]["acc_e"]["value"]) for row in results["rows"]] == [
        ("ours, d1 5", 30.0),
        ("ours, d1 10", 10.0),
    ]
