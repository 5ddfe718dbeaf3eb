"""A run that is killed at any moment and given again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tearing import leftovers

KILLS, SEED = 20, 0
WORDS = [
    "concept=airplane",
    "method.align.steps=12",
    "method.latents.images=4",
    "method.latents.chunk=1",
    "method.latents.batch=1",
    "images_at_once=3",
    "trainer.checkpoint_every=2",
    "task.images={erase:6,near:1,keep:1,associated:1,unseen:1}",
]
SAME = ("manifest.jsonl", "losses.jsonl", "edit.json", "metrics.json")
JUDGED = ("miniature.jsonl", "miniature.original.jsonl", "miniature.json")

# Imports everything once, then forks a process for every command: a start of two seconds that writes nothing is reused.
NURSERY = """
import json, os, sys, time
from importlib import import_module
for name in ("train", "runs.steps", "tracking.trackers", "sweeps.shared_model", "reporting.run_page",
             "judges.miniature", "training.fit", "methods.realera", "backbones.unet"):
    import_module(f"realera.{name}")
from realera import cli, train
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(asked["place"])
        os.environ["REALERA_CACHE"] = asked["cache"]
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv[:] = ["train", *asked["words"]]
        cli.as_process(train.main)
    if asked["kill"]:
        time.sleep(asked["after"])
        os.kill(child, asked["kill"])  # it was not waited for yet, so the number is still its own
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Nursery:
    """Gives the command again and again, each time in a process of its own."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "REALERA_STAMP": "stamp"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def give(self, place: Path, kill: signal.Signals | None = None, after: float = 0.0) -> int:
        """The command's exit status; a killed one's is negative, or what it makes of the signal."""
        place.mkdir(exist_ok=True)
        folders = {"place": place, "cache": place / "cache", "log": place / "log.txt"}
        asked: dict[str, Any] = {name: str(folder) for name, folder in folders.items()}
        asked |= {"words": self.words, "kill": kill, "after": after}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{json.dumps(asked)}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery(small: list[str]) -> Iterator[Nursery]:
    made = Nursery([*(word for word in small if not word.startswith("task.images")), *WORDS])
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(60)


def run_in(place: Path) -> Path:
    (run,) = (place / "runs").glob("airplane-*")
    return run


def stage_of(place: Path) -> str:
    """How far a killed run had come."""
    found = list((place / "runs").glob("airplane-*"))
    if not found or not (found[0] / "config.yaml").is_file():
        return "nothing"
    order = {"metrics.json": "judged", "images": "drawing", "erased.safetensors": "erased", "losses.jsonl": "training"}
    return next((stage for name, stage in order.items() if (found[0] / name).exists()), "begun")


def check_same(place: Path, reference: Path) -> None:
    ours, theirs = run_in(place), run_in(reference)
    for name in (*SAME, *(f"verdicts/{name}" for name in JUDGED)):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    steps = [json.loads(line)["step"] for line in (ours / "losses.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
    for name in ("erased.safetensors", "map.safetensors", "neighbours.safetensors"):
        one, other = load_file(ours / name), load_file(theirs / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    for folder in (place / "cache", ours / "images", ours / "originals"):
        there = reference / folder.relative_to(place)
        files = sorted(file.relative_to(folder) for file in folder.rglob("*.png"))
        assert files == sorted(file.relative_to(there) for file in there.rglob("*.png"))
        assert all((folder / file).read_bytes() == (there / file).read_bytes() for file in files)
    assert leftovers(place / "runs", place / "cache") == []


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(nursery: Nursery, tmp_path: Path) -> None:
    """Ten by SIGKILL and ten by SIGTERM, in the middle of whatever a run does. One that ends before it is killed is
    compared with the run that nothing disturbed, and another one is begun."""
    reference = tmp_path / "reference"
    assert nursery.give(tmp_path / "warm") == 0
    began = time.monotonic()
    assert nursery.give(reference) == 0, (reference / "log.txt").read_text()
    takes = time.monotonic() - began
    chance = random.Random(SEED)
    signals = [signal.SIGKILL, signal.SIGTERM] * (KILLS // 2)
    chance.shuffle(signals)
    killed: list[str] = []
    places = iter(tmp_path / f"killed{number}" for number in range(100))
    place = next(places)
    while len(killed) < KILLS:
        status = nursery.give(place, signals[len(killed)], chance.uniform(0.1, 1.0) * takes)
        if status == 0:
            check_same(place, reference)
            place, takes = next(places), 0.8 * takes  # the machine may be quicker now, or slower
        else:
            assert status in (-signal.SIGKILL, -signal.SIGTERM, 130, 143), (place / "log.txt").read_text()
            killed.append(stage_of(place))
            takes *= 1.15 if killed[-1] in ("nothing", "begun") else 1.0
    assert nursery.give(place) == 0, (place / "log.txt").read_text()
    check_same(place, reference)
    print(f"killed in: {', '.join(killed)}")
    assert {"drawing", "erased", "judged"} & set(killed) and {"begun", "training", "nothing"} & set(killed)
