"""Sweeps: no job stops another, cells.jsonl and the exit status say how each ended, a finished cell is found again."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from quick import slow_unless
from realera import cli, report, train
from realera.sweeps import jobs as sweep
from realera.sweeps import planning
from realera.sweeps.jobs import Cell
from realera.system import disk

Type = Callable[..., int]
UCE = ["method=uce", "evaluate=false"]


@pytest.fixture
def type_in(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Runs `python -m realera.train -m words` in this process and returns the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("REALERA_STAMP", "stamp")

    def run(*words: str, flag: str = "-m") -> int:
        monkeypatch.setattr(sys, "argv", ["train", *([flag] if flag else []), *words, *small])
        try:
            train.main()
        except SystemExit as left:
            return int(left.code or 0)
        return 0

    return run


def read_lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs/sweeps/stamp/cells.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_no_job_stops_the_others_and_a_finished_cell_is_found(
    type_in: Type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from realera.runs import steps

    erase = steps.erase

    def fails_for_one(session: Any, *more: Any) -> None:
        if session.settings.seed == 1:
            raise ZeroDivisionError("a bug of the code")
        erase(session, *more)

    monkeypatch.setattr(steps, "erase", fails_for_one)
    assert type_in(*UCE, "concept=nothingknown,airplane", "seed=0,1,2") == 1
    said = capsys.readouterr().out
    assert "2 done, 3 refused, 1 failed" in said and "a bug of the code" in said
    cells = read_lines()
    assert [cell["state"] for cell in cells] == ["refused"] * 3 + ["done", "failed", "done"]
    assert "is not one of the classes" in cells[0]["reason"] and cells[0]["folder"] is None
    assert cells[4]["reason"].startswith("ZeroDivisionError: a bug of the code (traceback in ")
    (kept,) = Path("runs/sweeps/stamp/failed").iterdir()
    assert "fails_for_one" in kept.read_text() and f"(traceback in {kept})" in cells[4]["reason"]
    assert "seed=1" in cells[4]["overrides"] and Path(cells[4]["folder"], "config.yaml").is_file()

    monkeypatch.setattr(steps, "erase", erase)
    assert type_in(*UCE, "concept=airplane", "seed=0,1,2") == 0
    assert "1 done, 2 already finished" in capsys.readouterr().out  # of this call alone
    assert [cell["state"] for cell in read_lines()[6:]] == ["found", "done", "found"]
    assert type_in(*UCE, "concept=nothingknown,airplane") == 2


@pytest.mark.slow
def test_a_launch_reports_only_its_own_cells(
    type_in: Type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from realera.runs import steps

    erase = steps.erase

    def beside_another(*all: Any) -> None:
        lost = Cell(state="failed", reason="another's", overrides=["concept=cat"], launch="another")
        disk.append(sweep.folder() / "cells.jsonl", json.dumps(vars(lost)) + "\n")
        erase(*all)

    monkeypatch.setattr(steps, "erase", beside_another)
    assert type_in("method=uce", "concept=airplane") == 0
    said = capsys.readouterr().out
    assert "1 done" in said and "1 failed" not in said and "another's" not in said
    assert "concept=cat: failed. another" in Path("runs/sweeps/stamp/report.html").read_text(), "the page is of all"


@pytest.mark.slow
def test_each_launch_keeps_its_tracebacks(type_in: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    from realera.runs import steps

    for word in ("first", "second"):
        monkeypatch.setattr(steps, "erase", lambda *all, word=word: {}[word])
        assert type_in(*UCE, "concept=airplane") == 1
    for word, cell in zip(("first", "second"), read_lines(), strict=True):
        (kept,) = re.findall(r"traceback in (.*)\)", cell["reason"])
        assert f"KeyError: '{word}'" in Path(kept).read_text()


def test_sweeps_that_start_in_the_same_second_have_different_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.time, "strftime", lambda form: "20260101-120000")
    own = sweep.new_stamp()
    assert own == f"20260101-120000-{os.getpid()}"
    monkeypatch.setattr(sweep.os, "getpid", lambda: 7)
    assert sweep.new_stamp() == "20260101-120000-7" != own
    monkeypatch.setattr(sweep.time, "strftime", lambda form: "20260101-120001")
    assert sweep.new_stamp() > own, "folders sort by time, whoever made them"


@pytest.mark.slow
def test_a_process_started_by_a_sweep_belongs_to_it(type_in: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REALERA_STAMP")
    assert type_in(*UCE, "concept=nothingknown") == 2
    (place,) = Path("runs/sweeps").iterdir()
    assert place.name == os.environ["REALERA_STAMP"] and re.fullmatch(rf"\d{{8}}-\d{{6}}-{os.getpid()}", place.name)
    monkeypatch.setattr(sweep.os, "getpid", lambda: 7)  # another process, with the first one's environment
    assert type_in(*UCE, "concept=nothingknown") == 2
    assert list(Path("runs/sweeps").iterdir()) == [place] and len(sweep.read_cells(place)) == 2


@pytest.mark.slow
def test_an_interrupted_sweep_says_so(
    type_in: Type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from realera.runs import steps

    erase = steps.erase

    def stops(session: Any, *more: Any) -> None:
        if session.settings.seed == 1:
            raise KeyboardInterrupt
        erase(session, *more)

    monkeypatch.setattr(steps, "erase", stops)
    assert type_in(*UCE, "concept=airplane", "seed=0,1,2") == 130
    assert [cell["state"] for cell in read_lines()] == ["done"]
    assert "1 done" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_page_can_be_written_later(
    type_in: Type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from realera.reporting.sweep import page as sweep_report

    def stops(*all: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_report, "write_sweep", stops)
    assert type_in("method=uce", "concept=airplane") == 130
    said = capsys.readouterr().err
    assert "interrupted: python -m realera.report runs/sweeps/stamp writes the page" in said


@pytest.mark.parametrize("ended", [1, 0])
@pytest.mark.slow
def test_a_launcher_that_gives_up_still_gives_the_page_and_a_sentence(
    ended: int, type_in: Type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = Plugins.instantiate_launcher

    def made(*all: Any, **more: Any) -> Any:
        launcher = make(*all, **more)
        launch = launcher.launch

        def gives_up(jobs: Any, initial_job_idx: int) -> Any:
            if ended:
                launch(jobs[:ended], initial_job_idx=initial_job_idx)
            raise RuntimeError("A worker was terminated.\nThe exit codes are {SIGKILL(-9)}")

        monkeypatch.setattr(launcher, "launch", gives_up)
        return launcher

    monkeypatch.setattr(Plugins, "instantiate_launcher", made)
    assert type_in("method=uce", "concept=airplane", "seed=0,1,2") == 1
    said = capsys.readouterr()
    (answer,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    told = re.match(
        r"error: the sweep ended early, by RuntimeError: A worker was terminated \(traceback in (.*)\)", answer
    )
    assert told and "SIGKILL" in Path(told[1]).read_text() and said.err.count("A worker was terminated") == 1
    assert ("1 done" in said.out and "page to open" in said.out) == bool(ended)
    assert Path("runs/sweeps/stamp/report.html").is_file() == bool(ended)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run_dir=own", "overwrite=true", "seed=0,1"], "run_dir=own is the folder of several jobs"),
        (["run_dir=own", "method.edit.ridge=0.5,5"], "such as run_dir='own/${seed}' for seeds."),
        (["experiment=search", "method=realera", "run_dir=own"], "run_dir=own is the folder of several jobs"),
        (["judge=miniature,clip"], "several jobs would judge runs/airplane-uce-"),
        (["hydra.job.chdir=true"], "hydra.job.chdir=true would put each job's files into a folder"),
    ],
)
def test_jobs_that_would_overwrite_each_other_s_files_are_refused(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "refuse_missing", lambda config: None)  # the search's extra
    monkeypatch.setattr(sys, "argv", ["train", "-m", "concept=airplane", "backbone=mini", "method=uce", *words])
    with pytest.raises(SystemExit) as left:
        train.main()
    (said,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and said.startswith("error: ") and sentence in said and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_experiment_is_refused_if_its_axes_would_be_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, sentence in (
        (["-m", "experiment=fig5_ds,fig5_mn"], "'experiment=fig5_ds' varies concept, method.neighbours.d1, "),
        (["experiment=table1"], "this experiment is a sweep with one job for each concept: add -m"),
    ):
        monkeypatch.setattr(sys, "argv", ["train", *words, "backbone=mini"])
        with pytest.raises(SystemExit) as left:
            train.main()
        (said,) = capsys.readouterr().err.splitlines()
        assert left.value.code == 2 and said.startswith(f"error: {sentence}") and not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["train", "-m", "experiment=quick", "concept=airplane,cat", "dry_run=true"])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert not left.value.code


@pytest.mark.slow
def test_jobs_with_different_folders_and_equal_jobs_are_not_refused(type_in: Type) -> None:
    assert type_in(*UCE, "concept=airplane", "seed=0,0,1", "run_dir='own/${concept}-${seed}'") == 0
    assert [cell["state"] for cell in read_lines()] == ["done", "found", "done"]
    assert {cell["folder"] for cell in read_lines()} == {"own/airplane-0", "own/airplane-1"}


def test_a_sweep_whose_folder_cannot_be_made_is_refused_at_once(
    type_in: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs").mkdir()
    Path("runs/sweeps").touch()
    assert type_in(*UCE, "concept=airplane,cat") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(
        "error: runs/sweeps/stamp, the folder for the sweep's list of runs and its page, cannot be made"
    )


@pytest.mark.slow
def test_a_full_disk_does_not_hide_the_error(
    type_in: Type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from realera.runs import steps

    def full(*all: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(steps, "erase", lambda *all: 1 / 0)
    monkeypatch.setattr(
        sweep.disk,
        "write_text",
        lambda path, text, write=sweep.disk.write_text: full() if path.parent.name == "failed" else write(path, text),
    )
    assert type_in(*UCE, "concept=airplane", "seed=0,1") == 1
    assert [cell["reason"] for cell in read_lines()] == ["ZeroDivisionError: division by zero."] * 2
    assert "2 failed" in capsys.readouterr().out
    monkeypatch.setattr(steps, "erase", full)
    assert type_in(*UCE, "concept=airplane", "seed=0,1") == 2, "a full disk is no fault of the code"
    assert all("No space left on device): free space" in cell["reason"] for cell in read_lines()[2:])


OWN = """
defaults: [train, _self_]
seed: 5
label: mine
"""


@pytest.mark.parametrize(
    "words",
    slow_unless(
        [
            ["--config-dir", "mine", "--config-name", "own"],
            ["--config-dir", "mine", "experiment=few"],
            ["hydra.searchpath=[file://mine]", "experiment=few"],
        ],
        ["--config-dir", "mine", "experiment=few"],
    ),
)
def test_typed_settings_stay_when_the_task_chooses_the_judge(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_STAMP", "stamp")
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/own.yaml").write_text(OWN)
    (tmp_path / "mine/experiment/few.yaml").write_text("# @package _global_\nseed: 5\nlabel: mine\n")
    seen: list[tuple[Any, ...]] = []

    def step(cfg: DictConfig) -> None:
        seen.append((cfg.seed, cfg.label, cfg.judge._target_))

    for flag in ([], ["-m"]):
        monkeypatch.setattr(sys, "argv", ["train", *flag, *words, "concept=airplane", "backbone=mini", "method=uce"])
        cli.run_command("train", step)
    assert seen == [(5, "mine", "realera.judges.miniature.MiniatureJudge")] * 2, capsys.readouterr().err


def test_an_unexpected_error_before_a_sweep_shows_its_traceback(type_in: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    none: dict[str, Any] = {}
    monkeypatch.setattr(planning, "plan_of", lambda *all: none["a bug"])
    assert type_in(*UCE, "concept=airplane") == 1 and not Path("runs/sweeps").exists()
    monkeypatch.setattr(cli.hydra, "main", lambda **all: lambda job: none["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        type_in(*UCE, "concept=airplane")


def test_a_single_run_writes_no_list_of_cells(type_in: Type) -> None:
    assert type_in(*UCE, "concept=airplane", flag="") == 0
    assert not Path("runs/sweeps").exists()


@pytest.mark.slow
def test_a_sweep_ends_with_its_page(type_in: Type, capsys: pytest.CaptureFixture[str]) -> None:
    assert type_in("method=uce", "concept=airplane", "method.edit.ridge=0.5,5") == 0
    page = Path("runs/sweeps/stamp/report.html")
    assert f"page to open: {page}" in capsys.readouterr().out and page.is_file()
    plan = json.loads(page.with_name("plan.json").read_text())
    assert (plan["cells"], plan["images"], plan["original_images"]) == (
        2,
        2 * plan["original_images"],
        plan["images"] / 2,
    )
    assert len(Path("runs/sweeps/stamp/runs.txt").read_text().splitlines()) == 2
    assert {cell["system"] for cell in read_lines()} == {"uce"}


@pytest.mark.slow
def test_another_sweep_can_rename_a_run_without_changing_the_first_page(
    type_in: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert type_in("method=uce", "concept=airplane", "label=first") == 0
    monkeypatch.setenv("REALERA_STAMP", "later")
    assert type_in("method=uce", "concept=airplane", "label='second ${seed}'") == 0
    monkeypatch.setattr(sys, "argv", ["report", "runs/sweeps/stamp"])
    report.main()
    for stamp, own, other in (("stamp", "first", "second 0"), ("later", "second 0", "first")):
        text = Path(f"runs/sweeps/{stamp}/report.html").read_text(encoding="utf-8")
        assert f"<td>{own}</td>" in text and f"<td>{other}</td>" not in text


@pytest.mark.parametrize(
    ("states", "status"),
    [(["done", "found"], 0), (["done", "refused"], 2), (["refused", "failed"], 1), (["failed"], 1), ([], 0)],
)
def test_the_exit_status_reports_refused_and_failed_jobs(states: list[str], status: int) -> None:
    assert sweep.status(Cell(state=state) for state in states) == status


def test_a_torn_line_is_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"folder": None, "state": "done", "reason": None, "overrides": [], "seconds": 1.0})] * 2
    (tmp_path / "cells.jsonl").write_text("\n".join(lines) + '\n{"folder": "x", "sta')
    assert len(sweep.read_cells(tmp_path)) == 2
    assert sweep.read_cells(tmp_path / "elsewhere") == []


def test_a_line_after_a_torn_line_is_read(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    disk.append(file, json.dumps(vars(Cell(folder="a"))) + "\n")
    file.write_bytes(file.read_bytes() + b'{"folder": "b", "sta')
    for name in ("c", "d"):
        disk.append(file, json.dumps(vars(Cell(folder=name))) + "\n")
    assert [Path(str(cell.folder)).name for cell in sweep.read_cells(tmp_path)] == ["a", "c", "d"]


def test_a_list_of_cells_without_launches_is_read(tmp_path: Path) -> None:
    line: dict[str, Any] = {"folder": "x", "state": "done", "reason": None, "overrides": [], "seconds": 1.0}
    (tmp_path / "cells.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps({**line, 'launch': 'now'})}\n")
    assert [cell.launch for cell in sweep.read_cells(tmp_path)] == [None, "now"]
    assert [cell.launch for cell in sweep.read_cells(tmp_path, "now")] == ["now"]


arrived: list[str] = []


def step(cfg: DictConfig) -> float:
    return 1.0


def same(cfg: DictConfig) -> DictConfig:
    return cfg


def arrive() -> None:
    arrived.extend(os.environ[name] for name in ("REALERA_STAMP", "REALERA_LAUNCH"))


def test_a_job_takes_stamp_launch_folder_and_resolvers_to_another_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REALERA_STAMP", "here")
    monkeypatch.setenv("REALERA_LAUNCH", "now")
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    monkeypatch.chdir(tmp_path)
    carried = pickle.dumps(sweep.Job(step, same, arrive, step_errors=[ValueError()]))
    monkeypatch.chdir("/")
    monkeypatch.delenv("REALERA_STAMP")
    monkeypatch.setenv("REALERA_LAUNCH", "an earlier one, of a worker that is used again")
    job = pickle.loads(carried)
    assert arrived == ["here", "now"] and Path.cwd() == tmp_path and job.step_errors == []
    assert job.step is step


def _this_module() -> Any:
    """pytest's importlib mode leaves a test module out of sys.modules under its own name; pickle looks there."""
    import types

    module = types.ModuleType(__name__)
    module.__dict__.update({"step": step, "same": same, "arrive": arrive})
    return module
