"""Two commands at the same time notice each other, and a lock ends with its process."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from realera.contracts import UserError
from realera.files import cache_costs
from realera.runs import folders
from realera.system import locks


@pytest.mark.slow
def test_a_run_of_another_process_is_refused(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_STAMP", "stamp")
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))

    def typed(door: str, *words: str) -> int:
        monkeypatch.setattr(sys, "argv", [door, *words])
        try:
            import_module(f"realera.{door}").main()
        except SystemExit as end:
            return int(str(end.code or 0))
        return 0

    train = ("train", "concept=airplane", "method=uce", "run_dir=run", *small)
    with folders.locked(Path("run")):
        assert typed(*train) == 2
        said = capsys.readouterr().err
        assert f"error: run is being made by process {os.getpid()} on " in said and "another run_dir" in said
        assert [path.name for path in Path("run").iterdir()] == [".lock"]
    assert not Path("run").exists()
    assert typed(*train) == 0 and not list(Path().rglob(".*"))
    capsys.readouterr()
    with folders.locked(Path("run")):
        for words in (train, (*train, "overwrite=true"), ("evaluate", "run=run"), ("train", "-m", *train[1:])):
            assert typed(*words) == 2, words
            assert "run is being made by process" in capsys.readouterr().err
        assert typed("report", "run") == 0, "who reads need not wait"
        assert typed("export", "run=run", "to=map", "out=out") == 0
    assert typed("evaluate", "run=run") == 0 and not list(Path().rglob(".*"))
    with folders.locked(Path("images"), key="out"):
        words = ("generate", "run=run", 'prompts=["a photo of a jet"]', "out=images")
        assert typed(*words) == 2 and "another out" in capsys.readouterr().err
    assert typed(*words) == 0


def test_the_lock_file_names_its_process(tmp_path: Path) -> None:
    file = tmp_path / "new" / ".lock"
    with locks.run_lock(file, "it", "wait"):
        said = json.loads(file.read_text())
        assert said["pid"] == os.getpid() and abs(said["since"] - time.time()) < 60
        with (
            pytest.raises(
                UserError, match=rf"^it is being made by process {os.getpid()} on '.*' since \d\d:\d\d: wait\.$"
            ),
            locks.run_lock(file, "it", "wait"),
        ):
            pass
        file.write_text('{"pid": "x", "host": "\\u001b[2J"')
        somebody = r"^it is being made by another process: wait\.$"
        with pytest.raises(UserError, match=somebody), locks.run_lock(file, "it", "wait"):
            pass
    assert not file.parent.exists()


def test_a_left_over_lock_file_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    file.write_text("left by a process that was killed")
    with locks.run_lock(file, "it", "wait"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_without_support_for_locks_work_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "lock", lambda handle, wait=False: None)
    file = tmp_path / ".lock"
    with locks.run_lock(file, "it", "wait"), locks.run_lock(file, "it", "wait"):
        pass
    place = tmp_path / "file"
    place.write_text("")
    with locks.run_lock(place / ".lock", "it", "wait"):  # a file in place of a folder: writing reports it
        pass


class Counter:
    passes = 0


def test_two_processes_make_a_cached_file_once(tmp_path: Path) -> None:
    file, made, found = tmp_path / "cache" / "a.safetensors", [], []

    def make() -> torch.Tensor:
        made.append(1)
        time.sleep(0.5)
        return torch.ones(2)

    def want() -> None:
        found.append(cache_costs.cached(file, "a", Counter(), make))  # type: ignore[arg-type]

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1 and len(found) == 3
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_only_one_process_has_the_lock(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with locks.exclusive(file) as first, locks.exclusive(file, wait=False) as second:
        assert (first, second) == (True, False)
    with locks.exclusive(file, wait=False) as third:
        assert third
    assert list(tmp_path.iterdir()) == []
