"""The numbers of attacks in the trackers of a run."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from realera.evaluation import attacked
from realera.evaluation.records import read_metrics
from realera.evaluation.results import scalars
from realera.runs import attacking
from realera.runs.folders import Run
from realera.tracking import content, trackers
from realera.tracking.base import Tracker
from wandb_files import whole

CSV = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": None}
BOARD = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "save_dir": None}
SHARE = {"value": 50.0, "low": 25.0, "high": 75.0, "n": 4}
COST = {"passes": 80, "text_passes": 500, "seconds": 1.5, "draws": 8, "once": {"passes": 0, "seconds": 0.0}}
NUMBERS: dict[str, Any] = {
    "asr": SHARE,
    "pre_asr": {"value": 0.0, "low": None, "high": None, "n": 4},
    "original": {**SHARE, "value": None},
    "prompts": 4,
    "steps": {"median": 10, "mean": 12.5},
    "curve": [[10, 25.0], [50, 50.0]],
    "returned": {"curve": [[0, 0.0], [10, 25.0], [50, 75.0]], "half": 23.5},
    "cost": COST,
}
QUIET: dict[str, Any] = {**NUMBERS, "steps": None, "curve": [[0, 0.0]], "returned": {"curve": [[0, 0.0]], "half": None}}


def numbers_in(file: Path) -> dict[str, list[tuple[int, float]]]:
    """{scalar: [(step, value)]} of a CSV logger's file."""
    found: dict[str, list[tuple[int, float]]] = {}
    with file.open(encoding="utf-8", newline="") as opened:
        for row in csv.DictReader(opened):
            for name, text in row.items():
                if text and name != "step":
                    found.setdefault(name, []).append((int(row["step"]), float(text)))
    return found


def in_wandb(folder: Path) -> dict[str, Any]:
    """The summary of a folder's W&B run, whose parts are one run for W&B."""
    ids, summary = set(), {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in whole(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            for item in record.summary.update:
                summary[str(item.key or "/".join(item.nested_key))] = json.loads(item.value_json)
    assert len(ids) == 1
    return summary


class Calls(Logger):
    """Remembers what it logs."""

    name = version = "calls"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[dict[str, float], int | None]] = []

    def log_hyperparams(self, params: Any) -> None:  # type: ignore[override]
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls.append((dict(metrics), step))


def test_the_numbers_of_an_attack_as_scalars_and_curves() -> None:
    del (plain := dict(QUIET))["returned"]
    assert attacked.scalars({"relearn": NUMBERS}) == {
        "relearn/asr": 50.0,
        "relearn/asr_low": 25.0,
        "relearn/asr_high": 75.0,
        "relearn/pre_asr": 0.0,
        "relearn/original_low": 25.0,
        "relearn/original_high": 75.0,
        "relearn/steps_median": 10.0,
        "relearn/steps_mean": 12.5,
        "relearn/half": 23.5,
        "relearn/passes": 80.0,
        "relearn/text_passes": 500.0,
        "relearn/seconds": 1.5,
    }
    assert attacked.curves({"relearn": NUMBERS, "random": plain}) == {
        "relearn/won": [(10, 25.0), (50, 50.0)],
        "relearn/returned": [(0, 0.0), (10, 25.0), (50, 75.0)],
    }
    assert not any("steps" in name or "half" in name for name in attacked.scalars({"random": plain, "quiet": QUIET}))
    with_attacks = scalars({"main": {}, "original": None, "attacks": {"relearn": NUMBERS}})
    assert with_attacks == {f"attacks/{name}": n for name, n in attacked.scalars({"relearn": NUMBERS}).items()}


def test_any_logger_gets_scalars_at_its_step_and_curves_at_theirs() -> None:
    logger = Calls()
    tracker = Tracker(logger)
    logger.log_metrics({"train/loss": 1.0}, step=7)
    trackers.log_attacks([tracker], {"relearn": NUMBERS})
    found = content.attacks_of({"relearn": NUMBERS})
    assert logger.calls[1] == (found.scalars, 7) and "eval/attacks/relearn/asr" in found.scalars
    curves = logger.calls[2:]
    assert ({"eval/attacks/relearn/returned": 75.0}, 50) in curves and len(curves) == 5


def test_an_existing_run_s_own_trackers_are_opened_again(tmp_path: Path) -> None:
    task = {"_target_": "realera.tasks.objects.ObjectTask"}
    own = {"task": task, "concept": "cat", "method": {"name": "uce"}, "logger": {"csv": CSV}}
    run = Run(tmp_path / "run", own)
    run.folder.mkdir()
    with trackers.reopened(run, {"csv": CSV}) as opened:
        trackers.log_attacks(opened, {"relearn": NUMBERS})
    found = numbers_in(run.folder / "csv" / "version_0" / "metrics.csv")
    assert found["eval/attacks/relearn/asr"] == [(0, 50.0)]
    assert found["eval/attacks/relearn/returned"] == [(0, 0.0), (10, 25.0), (50, 75.0)]
    with trackers.reopened(run, {"_target_": None}) as none:
        assert none == [], "logger=none"
    with trackers.reopened(Run(run.folder, {**run.config, "logger": None}), {"csv": CSV}) as none:
        assert none == [], "a run without a logger"
    assert not (run.folder / "csv" / "version_1").exists()


def test_tensorboard_shows_the_curve_of_the_last_settings_alone(tmp_path: Path) -> None:
    """As metrics.json has them alone: the points of two settings would be one line that goes back and forth."""
    pytest.importorskip("tensorboard", reason="pip install 'realera[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    task = {"_target_": "realera.tasks.objects.ObjectTask"}
    own = {"task": task, "concept": "cat", "method": {"name": "uce"}, "logger": {"tensorboard": BOARD}}
    run = Run(tmp_path / "run", own)
    run.folder.mkdir()
    for curve in ([[0, 0.0], [10, 25.0], [50, 75.0]], [[0, 0.0], [5, 50.0]]):
        with trackers.reopened(run, {"tensorboard": BOARD}) as opened:
            numbers = {**NUMBERS, "returned": {"curve": curve, "half": None}}
            trackers.log_attacks(opened, {"relearn": numbers, "random": NUMBERS})
    board = run.folder / "tensorboard"
    for attack, expected in (("relearn", [(0, 0.0), (5, 50.0)]), ("random", [(0, 0.0), (10, 25.0), (50, 75.0)])):
        events = EventAccumulator(str(board / "eval" / "attacks" / attack)).Reload()
        found = events.Scalars(f"eval/attacks/{attack}/returned")
        assert [(point.step, point.value) for point in found] == expected
    events = EventAccumulator(str(board)).Reload()
    assert "eval/attacks/relearn/asr" in events.Tags()["scalars"]
    assert "eval/attacks/relearn/returned" not in events.Tags()["scalars"]


@pytest.fixture
def type_in(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))

    def run(name: str, *words: str) -> None:
        own = [word for word in small if word != "logger=none"] if "run=run" not in words else []
        monkeypatch.setattr(sys, "argv", [name, *words, *own])
        import_module(f"realera.{name}").main()

    return run


@pytest.mark.slow
def test_attacks_are_logged_by_the_trackers_of_the_run(
    type_in: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the training, after it, by the command, and without any training; in CSV and in W&B offline."""
    words = ["concept=airplane", "method=uce", "run_dir=run", "logger=[wandb,csv]"]
    type_in("train", *words, "attacks=[random]")
    folder = tmp_path / "run"

    def in_csv(version: int, name: str) -> dict[str, list[float]]:
        found = numbers_in(folder / "csv" / f"version_{version}" / "metrics.csv")
        head = f"eval/attacks/{name}/"
        return {key: [value for _, value in points] for key, points in found.items() if key.startswith(head)}

    def expected(name: str) -> dict[str, list[float]]:
        numbers = content.attacks_of({name: attacked.numbers(folder)[name]})
        curves = {key: [value for _, value in points] for key, points in numbers.curves.items()}
        return {key: pytest.approx(one) for key, one in ({k: [v] for k, v in numbers.scalars.items()} | curves).items()}

    assert "eval/attacks/random/asr" in expected("random") and in_csv(1, "random") == expected("random")
    assert not in_csv(0, "random") and read_metrics(folder)["attacks"].keys() == {"random"}
    summary = in_wandb(folder)
    assert {k: [summary[k]] for k in expected("random")} == expected("random") and "eval/h_o" in summary

    tiny = "attack.steps=[1,2] attack.count=1 attack.batch=1 limit=1"
    type_in("train", *words, f'attacks=[random,"relearn {tiny}"]')
    assert in_csv(2, "relearn") == expected("relearn") and not in_csv(2, "random"), "only the missing one"
    assert len(in_csv(2, "relearn")["eval/attacks/relearn/returned"]) == 3
    assert [in_wandb(folder)["eval/attacks/relearn/asr"]] == expected("relearn")["eval/attacks/relearn/asr"]

    type_in("attack", "run=run", "attack=closed-form", "limit=1", "logger=[wandb,csv]")
    assert in_csv(3, "closed-form") == expected("closed-form")
    type_in("attack", "run=run", "attack=random", "attack.name=quiet", "limit=1", "logger=none")
    assert not (folder / "csv" / "version_4").exists()
    type_in("evaluate", "run=run", "logger=csv")
    again = numbers_in(folder / "csv" / "version_4" / "metrics.csv")
    assert {"eval/h_o", "eval/attacks/random/asr", "eval/attacks/quiet/asr", "eval/attacks/relearn/returned"} <= set(
        again
    )

    type_in("attack", "run=original", "concept=airplane", "run_dir=control", "attack=random", "limit=1", "logger=csv")
    found = numbers_in(tmp_path / "control" / "csv" / "version_0" / "metrics.csv")
    assert "eval/attacks/random/asr" in found

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(attacking, "carry_out", interrupted)
    with pytest.raises(SystemExit):
        type_in("train", *words, "attacks=[random,inpaint]")
    assert "eval/h_o" in in_wandb(folder), "the run's own results stay"
