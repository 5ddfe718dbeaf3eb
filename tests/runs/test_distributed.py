"""Runs with two and three real processes on the CPU give the same images, verdicts and numbers as one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from realera import cli
from realera.runs.processes import _free_port

pytestmark = pytest.mark.slow
SOURCE = str(Path(cli.__file__).parents[1])
REALERA = [
    "method=realera",
    "method.align.steps=4",
    "method.latents.images=4",
    "method.latents.batch=4",
    "task.images={erase:2,near:1,keep:1,associated:0,unseen:0}",
]
UCE = ["method=uce", "task.images={erase:30,near:1,keep:2,associated:0,unseen:0}"]
METHODS = {  # and the difficulty that each has with several processes
    "sa": (  # a Fisher information that all processes compute together
        "method.latents.replay.images=4",
        "method.align.fisher.samples=3",
        "method.align.fisher.timesteps=4",
        "method.align.fisher.chunk=1",
    ),
    "mace": ("concept=[airplane,ship]",),  # adapters that are frozen while another concept's adapter trains
    "fmn": (),  # weights that the loss does not depend on
}
COUNT = {"one": [], "two": ["trainer=ddp", "trainer.devices=2"], "three": ["trainer=ddp", "trainer.devices=3"]}
Command = Callable[..., "subprocess.Popen[str]"]


def give(folder: Path, model: Path, many: str, *words: str) -> subprocess.Popen[str]:
    """Starts the command in its own process group, with its own runs and cache."""
    folder.mkdir(exist_ok=True)
    small = [
        "concept=airplane",
        "backbone=mini",
        f"backbone.pretrained={model}",
        "backbone.text={width:32,row_norm:5.7,max_length:77}",
        "backbone.sampler.steps=3",
        "images_at_once=2",
        "logger=none",
    ]
    words = (*small, *words, *COUNT[many], "trainer.accelerator=cpu")
    return start(folder, [sys.executable, "-m", "realera.train", *words])


def start(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": SOURCE, "REALERA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def done(process: subprocess.Popen[str]) -> str:
    """The output of a process, which must succeed."""
    shown, said = process.communicate(timeout=400)
    assert process.returncode == 0, shown + said
    return shown


def run_in(folder: Path) -> Path:
    return next(folder.glob("runs/*/config.yaml")).parent


def pictures(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.glob("*/*.png")}


def metrics(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of many images, made by one process."""
    folder = tmp_path_factory.mktemp("distributed") / "one"
    done(give(folder, tiny_sd, "one", *UCE))
    return run_in(folder)


def test_two_processes_give_the_same_run_as_one(tiny_sd: Path, tmp_path: Path) -> None:
    for many in ("one", "two"):
        shown = done(give(tmp_path / many, tiny_sd, many, *REALERA))
        assert shown.count("page to open") == 1
    one, two = run_in(tmp_path / "one"), run_in(tmp_path / "two")
    assert one.name == two.name  # the number of processes is not part of a run's identity
    first, second = (load_file(run / "erased.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
    assert len(pictures(one)) == len(pictures(two)) > 20
    for name in pictures(one):
        before, after = (np.asarray(Image.open(run / name)).astype(int) for run in (one, two))
        assert abs(before - after).max() <= (1 if name.startswith("images") else 0), name
    said = [
        [json.loads(line) for line in (run / "verdicts" / "miniature.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert [(line["id"], line["label"]) for line in said[0]] == [(line["id"], line["label"]) for line in said[1]]
    assert [line["value"] for line in said[1]] == pytest.approx([line["value"] for line in said[0]], abs=2e-3)
    for name, estimate in metrics(one)["main"].items():
        assert metrics(two)["main"][name]["value"] == pytest.approx(estimate["value"], abs=0.2), name


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_the_same_weights_as_one(method: str, tiny_sd: Path, tmp_path: Path) -> None:
    words = (f"method={method}", "method.latents.images=4", "method.latents.batch=4", "method.align.steps=3")
    for many in ("one", "two"):
        done(give(tmp_path / many, tiny_sd, many, *words, *METHODS[method], "evaluate=false"))
    one, two = (run_in(tmp_path / many) for many in ("one", "two"))
    assert one.name == two.name
    first, second = (load_file(run / "erased.safetensors") for run in (one, two))
    before = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    assert first.keys() == second.keys() and len(first) > 10
    moved = {name: float((value - before[name.removeprefix("edit.")]).norm()) for name, value in first.items()}
    apart = sum(float((first[name] - second[name]).norm()) ** 2 for name in first) ** 0.5
    # AdamW's first steps are lr * sign(g): where g is nearly 0, rounding shows
    assert apart < 0.01 * sum(value**2 for value in moved.values()) ** 0.5
    costs = [json.loads((run / "costs.json").read_text()) for run in (one, two)]
    assert costs[0]["trained_parameters"] == costs[1]["trained_parameters"]
    if method == "sa":
        files = [next((tmp_path / many / "cache" / "fisher").iterdir()) for many in ("one", "two")]
        alone, shared = map(load_file, files)
        assert files[0].name == files[1].name and alone.keys() == shared.keys()
        assert all((alone[name] - shared[name]).norm() <= 1e-5 * alone[name].norm() for name in alone)


def test_two_processes_write_the_same_bytes_without_training(tiny_sd: Path, whole: Path, tmp_path: Path) -> None:
    done(give(tmp_path, tiny_sd, "two", *UCE))
    run = run_in(tmp_path)
    assert pictures(run) == pictures(whole)
    for name in ("manifest.jsonl", "verdicts/miniature.jsonl", "verdicts/miniature.original.jsonl", "metrics.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    two, one = (json.loads((place / "costs.json").read_text()) for place in (run, whole))
    assert two["passes"] == one["passes"] and two["passes"]["draw"] > 0 and two["originals"]["passes"] > 0
    assert two["device"] == f"{one['device']}, 2 processes"
    assert {file.name for file in run.rglob("*")} == {file.name for file in whole.rglob("*")}


@pytest.fixture
def broken(tiny_sd: Path, tmp_path: Path) -> Callable[[bool], tuple[Path, subprocess.Popen[str]]]:
    """A run of two processes in which all of them, or the second one only, were killed while they drew."""

    def kill(everyone: bool) -> tuple[Path, subprocess.Popen[str]]:
        folder = tmp_path / "broken"
        process = give(folder, tiny_sd, "two", *UCE)
        until = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < until and not list(folder.glob("runs/*/images/*.png")):
            time.sleep(0.001)
        if everyone:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            if not children.is_file():
                pytest.skip("the system does not say which processes another has started")
            os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        return folder, process

    return kill


def test_a_run_killed_with_two_processes_continues_with_one_and_with_three(
    tiny_sd: Path, whole: Path, broken: Callable[[bool], Any], tmp_path: Path
) -> None:
    folder, process = broken(True)
    process.wait()
    assert 0 < len(list(run_in(folder).glob("images/*.png"))) < len(list(whole.glob("images/*.png")))
    shutil.copytree(folder, tmp_path / "other")
    for place, many in ((folder, "one"), (tmp_path / "other", "three")):
        done(give(place, tiny_sd, many, *UCE))
        run = run_in(place)
        assert (run / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
        assert pictures(run) == pictures(whole)


def test_a_process_that_dies_ends_the_run_with_a_sentence(
    tiny_sd: Path, whole: Path, broken: Callable[[bool], Any]
) -> None:
    folder, process = broken(False)
    began = time.monotonic()
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2 and "another process of this run has ended" in said and "Traceback" not in said
    assert time.monotonic() - began < 60
    assert not (run_in(folder) / "metrics.json").exists()


def test_torchrun_judges_and_draws_with_several_processes(tiny_sd: Path, whole: Path, tmp_path: Path) -> None:
    """The processes draw the missing images with the weights and settings of the run."""
    shutil.copytree(whole.parents[1], tmp_path / "copy")
    run = run_in(tmp_path / "copy")
    for file in [*sorted(run.glob("images/*.png"))[::3], run / "metrics.json", run / "verdicts" / "miniature.jsonl"]:
        file.unlink()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    shown = done(start(tmp_path / "copy", [*torchrun, "-m", "realera.evaluate", f"run={run}"]))
    assert shown.count("page to open") == 1
    assert pictures(run) == pictures(whole)
    assert (run / "verdicts" / "miniature.jsonl").read_bytes() == (whole / "verdicts/miniature.jsonl").read_bytes()
    prompts = ['prompts=["a photo of a cat","a red ship"]', "seeds=[0,1]", f"out={tmp_path / 'out'}"]
    shown = done(start(tmp_path / "copy", [*torchrun, "-m", "realera.generate", f"run={run}", *prompts]))
    assert shown.count("manifest:") == 1
    assert len(list((tmp_path / "out" / "images").iterdir())) == 4
