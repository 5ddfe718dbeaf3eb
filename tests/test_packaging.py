"""What a fresh checkout is made of: versions that agree, verbs that explain themselves, a licence."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import realera

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]


def test_the_version_is_one() -> None:
    assert PROJECT["version"] == realera.__version__


def test_every_dependency_has_a_tested_version_within_its_range() -> None:
    tested = {canonicalize_name(line.name): line for line in CONSTRAINTS}
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["build"]]:
        wanted = Requirement(text)
        pinned = tested[canonicalize_name(wanted.name)]
        (version,) = (spec.version for spec in pinned.specifier)
        assert wanted.specifier.contains(version), f"{pinned} is outside {wanted}"


def test_nothing_names_one_index() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".github/workflows/ci.yml"):
        assert "http" not in (ROOT / name).read_text(encoding="utf-8"), name


def test_every_command_is_there() -> None:
    assert len(PROJECT["scripts"]) == 8
    for target in PROJECT["scripts"].values():
        assert callable(resolve_name(target))


def test_every_verb_of_make_says_what_it_does() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert verbs is not None
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for verb in verbs[1].split():
        assert re.search(rf"^  make {verb} +\S", said, re.MULTILINE), verb
    assert {"help", "setup", "demo", "test", "check", "bench", "train", "sweep", "report"} <= set(verbs[1].split())


def test_setting_up_twice_does_nothing(tmp_path: Path) -> None:
    make = ["make", "-s", "setup", f"VENV={tmp_path}"]
    wanted = subprocess.run([*make, "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    stamp = re.search(r"touch (\S+)", wanted)
    assert stamp is not None and "pip install" in wanted
    Path(stamp[1]).touch()
    assert "pip" not in subprocess.run([*make, "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for changed in ("EXTRAS=build",):
        assert (
            "pip" in subprocess.run([*make, "-n", changed], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        )


def test_the_machine_runs_what_a_person_runs() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert {step.split()[1] for step in steps} == {"setup", "check", "test", "demo"}
    assert all(step.startswith("make ") for step in steps)


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000
    assert PROJECT["license"] == "Apache-2.0"
