"""Costs in tables, on pages and in the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from realera import console, paths
from realera.contracts import Prompt, Verdict
from realera.evaluation.measures import MEAN_PROB
from realera.evaluation.records import ManifestEntry, verdict_file, write_manifest, write_verdicts
from realera.evaluation.results import measure
from realera.reporting import cost_words
from realera.reporting.run_page import write_report
from realera.reporting.sweep.page import write_sweep
from realera.reporting.table import MARKS, markdown, write_results
from realera.system import disk


def record(seconds: float = 1.25, passes: int = 1000, **more: Any) -> dict[str, Any]:
    return {
        "format_version": 1,
        "device": "cpu, 1 thread",
        "stages": {"load": 70.0, "edit": seconds, "draw": 80.0},
        "passes": {"erase": passes, "draw": 5000},
        "passes_per_image": 40,
        "shared": {"latents": {"seconds": 10.0, "passes": 240}},
        "trained_parameters": 3712,
        "edited_parameters": 98304,
        "peak_memory_erasing_mb": {"host": 811.7, "device": None},
        "peak_memory_mb": {"host": 999.0, "device": None},
        "starts": 1,
        **more,
    }


def test_a_mean_is_over_the_runs_with_known_costs() -> None:
    found = cost_words.mean([record(1.0, 1000), record(3.0, 2000), {}])
    assert found["seconds"] == 12.0 and found["passes"] == 1740 and found["runs"] == 2
    assert found["trained_parameters"] == 3712 and found["memory_mb"] == 811.7
    assert found["devices"] == ["cpu, 1 thread"] and not found["at_least"]
    assert cost_words.mean([{}, {"format_version": 1}]) == {}


def test_numbers_are_short_and_unknown_costs_are_marked() -> None:
    found = cost_words.mean([record()])
    assert [cost_words.text(found, name) for name in cost_words.COLUMNS] == ["11", "1,240", "40", "3,712", "812"]
    assert (
        cost_words.text({"seconds": 1.25}, "seconds") == "1.2" and cost_words.text({"seconds": 0.0}, "seconds") == "0"
    )
    assert cost_words.text({}, "seconds") == "–"
    unknown = cost_words.mean([record(shared={"latents": {"seconds": 0.0, "passes": 0, "unknown": 2}})])
    assert cost_words.text(unknown, "passes") == "≥ 1,000" and cost_words.text(unknown, "passes_per_image") == "40"


def test_a_line_for_the_terminal() -> None:
    text = cost_words.sentence(record())
    assert text.startswith("11 s to erase, 1,240 denoiser passes to erase, 40 denoiser passes per image, 3,712 trained")
    assert text.endswith("812 MB peak memory while erasing (cpu, 1 thread)")
    assert cost_words.sentence({}) == "" and cost_words.stages({}) == []


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Judged runs: two systems with costs, one without."""
    folders = []
    for i, (system, spent) in enumerate([("realera", record()), ("<sld>", record(passes_per_image=60)), ("old", None)]):
        folder = tmp_path / system.strip("<>")
        prompts = [Prompt(f"{s}-0", "a photo", "cat", s, 0) for s in ("erase", "near", "keep")]  # type: ignore[arg-type]
        write_manifest(folder, [ManifestEntry(p, f"images/{p.id}.png", "s") for p in prompts])
        write_verdicts(verdict_file(folder, "eye"), [Verdict(p.id, 0.2 + 0.1 * i, "cat") for p in prompts])
        measure(folder, "eye", {"judge": {"judge": "eye"}}, MEAN_PROB)
        config = {"concept": "cat", "seed": 0, "method": {"name": system}, "backbone": {"name": "mini"}}
        disk.write_text(folder / paths.CONFIG, yaml.safe_dump(config))
        if spent is not None:
            disk.write_text(folder / paths.COSTS, json.dumps(spent))
        folders.append(folder)
    return folders


def test_tables_are_followed_by_a_table_of_costs(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{MARKS[0]}\n{MARKS[1]}\n")
    results = json.loads(write_results(runs, tmp_path).read_text())
    rows = {row["system"]: row for row in results["rows"]}
    assert rows["realera"]["cost"]["passes"] == 1240 and rows["realera"]["cost"]["edited_parameters"] == 98304
    assert "cost" not in rows["old"]
    first, _, second = (tmp_path / "README.md").read_text().partition("Cost: mean over runs on cpu, 1 thread.")
    assert "Acc_e" in first and "passes" not in first
    lines = second.splitlines()
    heads = "seconds to erase | passes to erase | passes per image | trained parameters | peak memory, MB"
    assert f"| system | {heads} |" in lines
    assert (
        "| realera | 11 | 1,240 | 40 | 3,712 | 812 |" in lines
        and "| \\<sld> | 11 | 1,240 | 60 | 3,712 | 812 |" in lines
    )
    assert "| old | – | – | – | – | – |" in lines
    assert "Cost" not in markdown({**results, "rows": [rows["old"]]})


def test_pages_show_the_cost_of_a_run(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs[0]).read_text(encoding="utf-8")
    section = page.partition("<h2>Cost</h2>")[2].partition("</section>")[0]
    assert "on cpu, 1 thread" in section and "<dt>denoiser passes to erase</dt><dd>1,240</dd>" in section
    assert "mining and closed form 1.2 s" in section and "original cost of cached inputs 10 s" in section
    assert "costs.json" in page
    assert "<h2>Cost</h2>" not in write_report(runs[2]).read_text(encoding="utf-8")
    several = write_sweep(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<th>cost</th>" in several and "11 s to erase<small>1,240 denoiser passes to erase</small>" in several
    assert "<th>cost</th>" not in write_sweep(runs[2:], tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_terminal_shows_the_cost_with_the_table(runs: list[Path]) -> None:
    metrics = json.loads((runs[0] / paths.METRICS).read_text())
    with console.console.capture() as capture:
        console.show_run(runs[0], metrics, "a run")
    assert "cost: 11 s to erase, 1,240 denoiser passes" in capture.get().replace("\n", " ")
    with console.console.capture() as capture:
        console.show_run(runs[2], metrics, "a run")
    assert "cost:" not in capture.get()


def test_passes_are_of_the_denoiser_which_may_be_a_transformer() -> None:
    root = Path(__file__).parents[2]
    places = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "conf").rglob("*.yaml")]
    places += [one for one in (root / "src").rglob("*") if one.suffix in (".py", ".j2")]
    assert len(places) > 200
    of_unet = re.compile(r"U-Net('s)? (pass|call)|pass(es)? of the U-Net")
    assert [str(one) for one in places if of_unet.search(one.read_text(encoding="utf-8"))] == []
