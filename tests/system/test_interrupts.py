"""A signal ends a command at any moment, as Ctrl-C does: the exit status gives the signal, and no temporary file is
left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import realera
from realera.system import interrupts

SOURCE = str(Path(realera.__file__).parents[1])
ENDING = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


def script(code: str, cwd: Path) -> subprocess.Popen[str]:
    """A process that prints `ready` when signals may be sent."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()


WITHIN = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from realera.system import disk, interrupts
interrupts.PATIENCE, interrupts.BOUNCE = 1.0, 0.1
try:
    with interrupts.handling(), disk.atomic(Path("file")) as beside:
        beside.write_text("half")
        {body}
except KeyboardInterrupt:
    print("answered")
    sys.exit(interrupts.exit_status())
"""
WAITS = 'print("ready"); time.sleep(60)'
SWALLOWS = """
        def swallow(deep):
            try:
                print("ready"); time.sleep(60)
            except BaseException:
                pass
        swallow(1)
        time.sleep(60)
"""
UNWINDS = """
        try:
            print("ready"); time.sleep(60)
        finally:
            print("ready"); time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), ENDING)
def test_a_signal_ends_the_work_and_removes_temporary_files(number: int, status: int, tmp_path: Path) -> None:
    process = script(WITHIN.format(body=WAITS), tmp_path)
    ready(process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (status, "answered\n") and list(tmp_path.iterdir()) == []


def test_a_swallowed_interruption_is_raised_again(tmp_path: Path) -> None:
    process = script(WITHIN.format(body=SWALLOWS), tmp_path)
    ready(process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "answered\n") and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_waits_outside_python_is_ended(tmp_path: Path) -> None:
    code = WITHIN.format(body='print("ready"); [ctypes.CDLL(None).usleep(400_000) for _ in iter(int, 1)]')
    code = code.replace("interrupts.handling()", "interrupts.handling(), deaf()").replace(
        "try:\n    with",
        "from contextlib import contextmanager\n@contextmanager\ndef deaf():\n"
        "    signal.signal(signal.SIGTERM, lambda number, frame: None)\n    yield\ntry:\n    with",
    )
    process = script(code, tmp_path)  # the main thread never runs its handler
    ready(process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and interrupts.GOES_ON in err and time.monotonic() - began < 10
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = script(WITHIN.format(body=UNWINDS), tmp_path)
    ready(process)
    process.send_signal(signal.SIGTERM)
    ready(process)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and interrupts.GOES_ON in err and time.monotonic() - began < 5
    assert list(tmp_path.iterdir()) == []


def test_ignored_signals_stay_ignored_and_handlers_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with pytest.raises(interrupts.Interrupted), interrupts.handling():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert interrupts.exit_status() == 143 and interrupts.was_interrupted()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_forked_process_has_its_own_signals(tmp_path: Path) -> None:
    body = """
        child = os.fork()
        if not child:
            time.sleep(60)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        ended = os.waitpid(child, 0)[1]
        time.sleep(1.5)
        print("ready", ended); os._exit(0)
"""
    process = script(WITHIN.format(body=body), tmp_path)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "ready 15\n"), err


@pytest.mark.quick(2)
@pytest.mark.parametrize("delay", [0.15, 0.3, 0.5, 0.7])
def test_a_signal_during_the_imports(delay: float, tmp_path: Path) -> None:
    """While Python itself starts, a signal ends it like any program."""
    process = subprocess.Popen(
        [sys.executable, "-m", "realera.train", "concept=airplane", "backbone=mini", "logger=none"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": SOURCE, "REALERA_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (143, -signal.SIGTERM) and "Traceback" not in err, err
    assert interrupts.GOES_ON in err or process.returncode < 0
    assert not list(tmp_path.rglob(".*"))


EARLY = """
import signal, sys
from importlib import abc, machinery

class Stops(abc.MetaPathFinder):  # sends the signal while this module is being imported
    def find_spec(self, name, path, target=None):
        if name == "realera.{module}":
            signal.raise_signal(signal.SIGTERM)

sys.meta_path.insert(0, Stops())
sys.argv = ["-m"]
sys.orig_argv = ["python", "-m", "realera.train"]
import realera.train
"""


EARLY_MODULES = ["system.disk", "system.locks", "contracts", "cli", "settings.error_sentences", "runs.processes"]


@pytest.mark.quick(2)
@pytest.mark.parametrize("module", EARLY_MODULES)
def test_a_signal_at_the_import_of(module: str, tmp_path: Path) -> None:
    process = script(EARLY.format(module=module), tmp_path)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and interrupts.GOES_ON in err and "Traceback" not in err, err


RUN = ["concept=airplane", "method.align.steps=40", "method.latents.images=4", "method.latents.batch=1"]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
STAGES = {  # stage: a file that exists when the stage begins
    "load": "config.yaml",
    "train": "losses.jsonl",
    "draw": "erased.safetensors",
    "judge": "manifest.jsonl",
    "report": "metrics.json",
}


SERVES = """
import sys, types
from pathlib import Path
from realera import cli, demo
from realera.runs import folders, preflight
folders.open_run = lambda given: folders.Run(Path("run"), config)
folders.concept_of = lambda config: "gun"
preflight.check_run = preflight.check_model = cli.say_backbone = lambda *given: None
sys.modules["realera.runs.steps"] = types.SimpleNamespace(load_run=lambda run: None, pairs_from=lambda *given: None)
config = {"backbone": {"name": "mini"}, "method": {"name": "uce"}}
sys.argv[1:] = ["run=run", "port=0"]
cli.as_process(demo.main)
"""


@pytest.mark.parametrize("seconds", [0, 0.7])
@pytest.mark.parametrize(("number", "status"), ENDING)
@pytest.mark.slow
def test_a_signal_ends_the_demo_at_any_time(number: int, status: int, seconds: float, tmp_path: Path) -> None:
    process = script(SERVES, tmp_path)
    assert process.stdout is not None
    assert any("page to open" in line for line in process.stdout), process.communicate()
    time.sleep(seconds)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == status


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[], ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]], ids=["alone", "two"]
)
@pytest.mark.parametrize(("number", "status"), ENDING)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_a_run_in_every_stage(
    stage: str, number: int, status: int, words: list[str], small: list[str], tmp_path: Path
) -> None:
    given = [word for word in small if not (words and word.startswith("trainer="))]
    process = subprocess.Popen(
        [sys.executable, "-m", "realera.train", *RUN, *given, *words, "run_dir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": SOURCE, "REALERA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 300
    while not (tmp_path / "run" / STAGES[stage]).exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        assert (tmp_path / "run" / "report.html").is_file(), "it was done before it was told"
    else:
        assert process.returncode == status and err.count(interrupts.GOES_ON) == 1, err
    assert "Traceback" not in err, err
    assert not list((tmp_path / "run").rglob(".*")), "half-made"
    alive = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
    assert not alive.stdout
