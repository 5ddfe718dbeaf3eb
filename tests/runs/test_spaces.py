"""to=space: a folder that names nothing of this machine and serves the page by python app.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement

from realera.files import checksums
from realera.runs import folders, presets, spaces, together
from realera.runs.folders import Run

PROMPTS = {"Its name": ["a photo of the airplane"]}


@pytest.fixture(scope="module")
def run(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose base model is a local folder."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("REALERA_CACHE", str(place / "cache"))
        patch.setattr(
            sys, "argv", ["train", "concept=airplane", "method=uce", "evaluate=false", f"run_dir={place}/uce", *small]
        )
        import_module("realera.train").main()
    return folders.open_run(str(place / "uce"))


@pytest.fixture(scope="module")
def space(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("space") / "out"
    spaces.write(out, {"uce": run}, PROMPTS, "6.31.0")
    return out


def test_the_folder_holds_all_that_the_page_needs(space: Path) -> None:
    names = {path.name for path in space.iterdir()}
    assert names == {
        "app.py",
        "requirements.txt",
        "README.md",
        ".gitattributes",
        "presets.json",
        "realera",
        "runs",
        "base",
    }
    assert (space / "realera/conf/demo.yaml").is_file() and (space / "realera/reporting/gradio_page.css").is_file()
    assert not list(space.rglob("__pycache__")) and not (space / "realera/miniature/weights").exists()
    assert presets.read(space / "presets.json") == PROMPTS


def test_the_readme_is_a_card_with_the_settings_of_a_space(space: Path, run: Run) -> None:
    card = SpaceCard.load(space / "README.md")
    data = card.data.to_dict()
    assert data["sdk"] == "gradio" and data["sdk_version"] == "6.31.0" and data["app_file"] == "app.py"
    assert data["title"] == "airplane, before and after" and len(data["short_description"]) <= 60
    assert "license" not in data and "models" not in data, "a local base model has its own licence, and no page"
    hub = Run(run.folder, {**run.config, "backbone": {**run.config["backbone"], "pretrained": "some/model"}})
    named = SpaceCard(spaces.readme({"uce": hub}, "6.31.0")).data.to_dict()
    assert named["models"] == ["some/model"]
    mini = Run(run.folder, {**run.config, "backbone": {**run.config["backbone"], "pretrained": None}})
    assert SpaceCard(spaces.readme({"uce": mini}, "6.31.0")).data.to_dict()["license"] == "apache-2.0"
    long = Run(run.folder, {**run.config, "concept": "a" * 50})
    assert len(SpaceCard(spaces.readme({"uce": long}, "6.31.0")).data.to_dict()["short_description"]) <= 60


def test_requirements_pin_what_is_installed(space: Path) -> None:
    lines = (space / "requirements.txt").read_text().splitlines()
    found = {Requirement(line).name: Requirement(line) for line in lines}
    assert lines[0] == "gradio==6.31.0" and {"torch", "diffusers", "transformers", "hydra-core"} <= set(found)
    assert "pytest" not in found and "matplotlib" not in found, "what an extra asks for is not needed"
    assert Requirement(f"torch=={torch.__version__.partition('+')[0]}") == found["torch"]


def test_nothing_in_it_names_a_folder_of_this_machine(space: Path, run: Run, tiny_sd: Path) -> None:
    own = [str(run.folder.parent), str(tiny_sd), str(Path.cwd())]
    config = yaml.safe_load((space / "runs/0-uce/config.yaml").read_text())
    assert config["backbone"]["pretrained"] == "base" and "judge" not in config and "run_dir" not in config
    for file in [path for path in space.rglob("*") if path.is_file() and path.suffix != ".py"]:
        text = file.read_bytes().decode(errors="ignore")
        assert not [one for one in own if one in text], file


def test_its_run_draws_what_the_run_draws(space: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from realera.runs import steps

    expected = steps.pairs_from(steps.load_run(run), run.settings)("a photo of the airplane", 1)
    monkeypatch.chdir(space)
    theirs = folders.open_run("runs/0-uce")
    together.check([theirs])
    drawn = steps.pairs_from(steps.load_run(theirs), theirs.settings)("a photo of the airplane", 1)
    assert all(torch.equal(drawn[which], expected[which]) for which in ("original", "erased"))
    checksums.verify(theirs.erased)


def test_settings_that_name_files_stay_here(run: Run) -> None:
    config = {**run.config, "task": {**run.config["task"], "prompts_csv": "/data/p.csv", "associated_file": "x"}}
    kept = spaces.drawing_settings(config, None)
    assert set(kept["task"]) == set(run.config["task"]) and kept["backbone"]["pretrained"] is None
    sld = {"name": "sld", "guide": {"_target_": "x"}, "edit": {"prior_cache": "/data/c"}}
    assert spaces.drawing_settings({**run.config, "method": sld}, None)["method"] == {
        "name": "sld",
        "guide": {"_target_": "x"},
    }


def typed(words: Sequence[str], place: Path) -> subprocess.CompletedProcess[str]:
    source = str(Path(spaces.__file__).parents[2])
    environ = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "realera.demo", *words], cwd=place, env=environ, capture_output=True, text=True
    )


@pytest.mark.slow
def test_it_is_written_and_starts_by_python_app(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    done = typed([f"run={run.folder}", "to=space", "out=made"], tmp_path)
    assert done.returncode == 0 and "python made/app.py" in done.stdout, done.stderr
    again = typed([f"run={run.folder}", "to=space", "out=made"], tmp_path)
    assert again.returncode == 2 and "contains other files" in again.stderr
    environ = {**os.environ, "GRADIO_SERVER_PORT": "0", "OMP_NUM_THREADS": "1"}
    environ.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "made/app.py")],
        cwd="/",
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+/", line)))
        read = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address).read().decode()
        assert "airplane, before and after" in read
        maps = Path(f"/proc/{process.pid}/cwd")
        assert not maps.exists() or maps.resolve() == (tmp_path / "made").resolve()
    finally:
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert "Traceback" not in said, said
