"""The attacks of several systems in results.json and in a README's table, from files alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from realera import paths
from realera.contracts import Prompt, UserError, Verdict
from realera.evaluation import attacked
from realera.evaluation.bootstrap import exact
from realera.evaluation.measures import MEAN_PROB
from realera.evaluation.records import ManifestEntry, verdict_file, write_manifest, write_verdicts
from realera.evaluation.results import measure
from realera.reporting.attacked_systems import attacked_systems, markdown
from realera.reporting.table import MARKS, write_results
from realera.system import disk


def line(concept: str, number: int, shown: bool, plain: bool = False, drawn: Sequence[Any] = ()) -> dict[str, Any]:
    prompt = Prompt(f"{concept}-{number}", f"a {concept}", concept, "erase", number)
    return {
        "id": prompt.id,
        "of": "abc",
        "key": attacked.key_of(prompt),
        "prompt": prompt.text,
        "concept": concept,
        "seed": number,
        "original": True,
        "plain": plain,
        "shown": shown,
        "step": 3 if shown else None,
        "text": "x",
        "said": None,
        "label": concept,
        "value": 0.5,
        "image": None,
        "file": None,
        "draws": 2,
        "passes": 10,
        "seconds": 1.5,
        "drawn": [[step, found] for step, found in drawn],
        "info": {},
    }


def attack(run: Path, name: str, lines: list[dict[str, Any]], draws_all: bool = False) -> None:
    prompts = [Prompt(one["id"], one["prompt"], one["concept"], "erase", one["seed"]) for one in lines]
    numbers = attacked.summarise(prompts, lines, [], "top1", draws_all)
    attacked.write(run, name, lines)
    attacked.write_numbers(run, name, {**numbers, "protocol": {"attack": {}, "mode": "top1"}})


@pytest.fixture
def systems(tmp_path: Path) -> dict[str, list[Path]]:
    """Two systems of two runs, a cat's and a dog's, with four prompts each; and one that was not attacked."""
    found = {}
    for system, won in (("uce", {"cat": 4, "dog": 2}), ("valera", {"cat": 1, "dog": 0}), ("quiet", {})):
        found[system] = [tmp_path / f"{system}-{concept}" for concept in ("cat", "dog")]
        for concept, run in zip(("cat", "dog"), found[system]):
            run.mkdir()
            if won:
                lines = [line(concept, number, number < won[concept], number == 0) for number in range(4)]
                attack(run, "random", lines)
    returns = [line("cat", number, True, drawn=[(10, number < 1), (50, True)]) for number in range(4)]
    attack(found["valera"][0], "relearn", returns, draws_all=True)
    return found


def test_shares_are_pooled_over_runs(systems: dict[str, list[Path]]) -> None:
    found = attacked_systems(systems, base="valera")
    assert [row["system"] for row in found["rows"]] == ["uce", "valera"]
    uce, valera = found["rows"]
    assert (uce["asr"]["random"]["value"], uce["asr"]["random"]["n"], uce["plain"]["value"]) == (75.0, 8, 25.0)
    assert valera["asr"]["random"]["value"] == 12.5 and valera["asr"]["relearn"]["n"] == 4
    low, high = uce["asr"]["random"]["over_concepts"]
    assert low < uce["asr"]["random"]["low"] and high >= uce["asr"]["random"]["high"], "concepts differ: 100 and 50"
    one = valera["asr"]["relearn"]
    assert "over_concepts" not in one and (one["low"], one["high"]) == pytest.approx(exact(100.0, 4), abs=1e-4)
    assert valera["returned"]["relearn"] == {
        "curve": [[0, 0.0], [10, 25.0], [50, 100.0]],
        "half": pytest.approx(23.33, abs=0.01),
    }
    (less,) = found["differences"]["rows"]
    assert less["system"] == "uce" and less["asr"].keys() == {"random"}
    assert less["asr"]["random"]["value"] == 62.5 and 0 < less["asr"]["random"]["low"] < 62.5


def test_no_attack_no_block(systems: dict[str, list[Path]]) -> None:
    assert attacked_systems({"quiet": systems["quiet"]}) == {} and markdown({}) == ""
    assert "differences" not in attacked_systems(systems, base="quiet")
    assert "differences" not in attacked_systems(systems)


@pytest.fixture
def judged(systems: dict[str, list[Path]]) -> list[Path]:
    """The runs of the systems that were attacked, judged."""
    folders = [run for system in ("uce", "valera") for run in systems[system]]
    for run in folders:
        method, concept = run.name.split("-")
        prompts = [Prompt(f"{s}-0", "a photo", concept, s, 0) for s in ("erase", "near", "keep")]  # type: ignore[arg-type]
        write_manifest(run, [ManifestEntry(p, f"images/{p.id}.png", "s") for p in prompts])
        write_verdicts(verdict_file(run, "eye"), [Verdict(p.id, 0.2, concept) for p in prompts])
        measure(run, "eye", {"judge": {"judge": "eye"}}, MEAN_PROB)
        config = {"concept": concept, "seed": 0, "method": {"name": method}, "backbone": {"name": "mini"}}
        disk.write_text(run / paths.CONFIG, yaml.safe_dump({**config, "root": "of-somebody/runs"}))
    return folders


def test_the_table_in_a_readme(systems: dict[str, list[Path]], judged: list[Path], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"before\n{MARKS[0]}\n{MARKS[1]}\nafter\n")
    results = json.loads(write_results(judged, tmp_path, base="uce").read_text())
    assert results["attacks"]["rows"] == json.loads(json.dumps(attacked_systems(systems)["rows"]))
    assert results["attacks"]["differences"]["base"] == "uce"
    text = (tmp_path / "README.md").read_text()
    assert "| system | as it is | random | relearn |" in text and text.endswith("after\n")
    assert "| uce | 25 [" in text and "| 75 [" in text and text.count("| – |") == 2
    assert "The step at which half of the concept is back" in text and "| valera | 23 |" in text


def test_runs_of_several_machines_are_pooled(
    judged: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the records of earlier runs and the new ones, in any order, the table over all is made."""
    file = Path(__file__).parents[2] / "experiments" / "pool.py"
    tool = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("pool", file))  # type: ignore
    spec.loader.exec_module(tool)  # type: ignore[union-attr]
    whole, pooled = tmp_path / "whole", tmp_path / "pooled"
    wanted = write_results(judged, whole, base="valera").read_text()
    pooled.mkdir()
    tool.pool("robustness", pooled, "valera", judged[2:])
    for run in judged[2:]:
        run.rename(run.with_name(f"away-{run.name}"))
    found = tool.pool("robustness", pooled, "valera", judged[:2])
    assert json.loads(found.read_text()) == json.loads(wanted), "the sweep has uce before valera"
    kept = (pooled / tool.RECORDS).read_bytes()
    tool.pool("robustness", pooled, "valera", judged[:2])
    assert (pooled / tool.RECORDS).read_bytes() == kept and found.read_text() == wanted
    with tarfile.open(pooled / tool.RECORDS) as archive:
        names = archive.getnames()
        settings = [archive.extractfile(name).read() for name in names if name.endswith(paths.CONFIG)]  # type: ignore
    assert len(settings) == 4 and not any(b"somebody" in text for text in settings)
    for run in judged[2:]:
        run.with_name(f"away-{run.name}").rename(run)
    monkeypatch.setenv("METHODS", "uce")
    tool.pool("robustness", pooled, "valera", judged[2:])
    now, was = json.loads(found.read_text()), json.loads(wanted)
    assert now["rows"] == was["rows"] and now["attacks"]["rows"] == was["attacks"]["rows"], "valera keeps its rows"
    assert now["attacks"]["differences"]["rows"] == [], "uce's were from earlier runs of uce"
    found.write_text(wanted)
    monkeypatch.setenv("METHODS", "valera")
    now = json.loads(tool.pool("robustness", pooled, "valera", []).read_text())
    assert now["rows"] == was["rows"] and "differences" not in now["attacks"], "they were from earlier runs of valera"
    monkeypatch.setenv("SEEDS", "1,2")
    with pytest.raises(UserError, match="none"):
        tool.pool("robustness", pooled, "valera", [])
    monkeypatch.delenv("SEEDS")
    found.write_text(wanted.replace('"judge": "eye"', '"judge": "ear"'))
    with pytest.raises(UserError, match="another judge"):
        tool.pool("robustness", pooled, "valera", judged[2:])
    found.write_text(wanted)
    (judged[0] / paths.LOCK).touch()
    with pytest.raises(UserError, match="being made"):
        tool.pool("robustness", pooled, "valera", judged[:1])
    alone = tool.pool("robustness", pooled, "valera", [], tmp_path / "alone")
    assert [row["system"] for row in json.loads(alone.read_text())["rows"]] == ["valera"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["robustness", "robustness_miniature", "valera", "nowhere"], "nowhere is not a finished run"),
        (["robustness", "nowhere", "valera"], "there is no folder"),
        (["nothing", "robustness_miniature", "valera"], "there is no experiment=nothing"),
        (["robustness"], "experiments/pool.py EXPERIMENT"),
    ],
)
def test_wrong_words_for_pooling_get_a_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "experiments" / "pool.py"
    done = subprocess.run([sys.executable, str(file), *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
