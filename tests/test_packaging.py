"""What a fresh checkout is made of: versions that agree, verbs that explain themselves, a licence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import conftest
import realera

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, PYTEST = SETTINGS["project"], SETTINGS["tool"]["pytest"]["ini_options"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]


def make(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`make words` as typed into a shell, whatever make these tests were started by."""
    outside = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
    for name in ("PYTHON", "VENV", "EXTRAS", "TORCH_PIP", "ARGS"):
        outside.pop(name, None)
    return subprocess.run(["make", *words], cwd=ROOT, env={**outside, **env}, capture_output=True, text=True)


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
        text = (ROOT / name).read_text(encoding="utf-8").replace("https://arxiv.org/", "")
        assert "http" not in text, name


def test_every_command_is_there() -> None:
    assert len(PROJECT["scripts"]) == 12
    for target in PROJECT["scripts"].values():
        assert callable(resolve_name(target))


def test_every_verb_of_make_says_what_it_does() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert verbs is not None
    said = make("help").stdout
    for verb in verbs[1].split():
        assert re.search(rf"^  make {verb} +\S", said, re.MULTILINE), verb
    assert {"help", "setup", "demo", "test", "check", "bench", "card", "train", "sweep", "report"} <= set(
        verbs[1].split()
    )


def test_setting_up_twice_does_nothing(tmp_path: Path) -> None:
    words = ("-s", "-n", "setup", f"VENV={tmp_path}")
    wanted = make(*words).stdout
    stamp = re.search(r"touch (\S+)", wanted)
    assert stamp is not None and "pip install" in wanted
    Path(stamp[1]).touch()
    assert "pip" not in make(*words).stdout
    assert "pip install" in make(*words, "EXTRAS=build").stdout


def set_up(place: Path, python: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`make setup` into `place`/venv with a stand-in for python3, a shell script of which `python` is the body."""
    stub = place / "stub"
    stub.write_text(f"#!/usr/bin/env bash\n{python}\n", encoding="utf-8")
    stub.chmod(0o755)
    return make("-s", "setup", f"VENV={place / 'venv'}", f"PYTHON={stub}", **env)


# A venv whose python says what it is asked to do; pip fails or is stopped where FAILS says so.
STAND_IN = """
case "$*" in
--version) echo "Python 3.11.0" ;;
"-m venv "*) mkdir -p "$3/bin" "$3/lib"; cp "$0" "$3/bin/python" ;;
*"pip install"*) echo "$*" >> "$(dirname "$0")/../asked"; echo "  Downloading torch-2.whl (9 MB)"
    case "$*" in *"$FAILS"*) kill -9 $$ ;; esac ;;
esac
"""


def test_a_python_that_will_not_do_is_one_sentence(tmp_path: Path) -> None:
    for python, said in (
        ("[ $1 != -c ] && echo Python 3.9.18 || exit 1", r"Python 3\.9\.18 is not one of 3\.10-3\.13: .*PYTHON="),
        ("[ $1 != -m ]", r"makes no environment with pip: install python3-venv"),
    ):
        done = set_up(tmp_path, python)
        # A disk with little room warns first.
        first, *more = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
        assert done.returncode == 2 and re.match(f"error: .*{said}", first), done.stderr
        assert len(more) == 1 and more[0].startswith("make: ***") and not (tmp_path / "venv").exists()
    done = make("-s", "setup", f"VENV={tmp_path / 'venv'}", "PYTHON=python9")
    assert done.returncode == 2 and "error: there is no python9 here: install Python 3.10-3.13" in done.stderr


@pytest.mark.parametrize("fails", ["torchvision", "-e .[dev]"])
def test_a_set_up_that_was_stopped_goes_on(tmp_path: Path, fails: str) -> None:
    done = set_up(tmp_path, STAND_IN, FAILS=fails)
    assert done.returncode == 2 and not list((tmp_path / "venv").glob(".setup-*"))
    torn, whole = (tmp_path / "venv" / "lib" / f"{name}.dist-info" for name in ("torn", "whole"))
    for folder in (torn, whole):
        folder.mkdir()
        (folder / "METADATA").touch()
    (whole / "RECORD").touch()  # pip writes it last
    done = set_up(tmp_path, STAND_IN, FAILS="nothing")
    assert done.returncode == 0, done.stderr
    assert not torn.exists() and whole.exists() and len(list((tmp_path / "venv").glob(".setup-*"))) == 1
    assert "minutes the first time" in done.stdout and "\n  torch-2.whl (9 MB)\n" in done.stdout
    asked = (tmp_path / "venv" / "asked").read_text(encoding="utf-8").splitlines()
    assert asked[-2].endswith("torch torchvision") and asked[-1].endswith("-e .[dev]")
    assert set_up(tmp_path, "exit 1").returncode == 0, "nothing is left to do"


def test_the_card_brings_the_extra_that_it_needs(tmp_path: Path) -> None:
    for verb, extras in (("card", "dev,build"), ("docs", "dev,docs"), ("bench", "dev"), ("test", "dev")):
        assert f"'.[{extras}]'" in make("-n", verb, f"VENV={tmp_path}").stdout


def test_the_machine_runs_what_a_person_runs() -> None:
    """The README's two commands come first, without a further word; what is typed with more comes after them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = re.search(r"^## Start\n+```sh\n(.*?)```", readme, re.MULTILINE | re.DOTALL)
    assert start is not None
    typed = start[1].splitlines()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line.removeprefix("as_a_person ") for line in script if line.startswith("as_a_person make")] == typed
    assert next(line for line in script if "make " in line and not line.startswith(("#", "step "))).endswith(typed[0])
    assert any(line.startswith("as_a_person()") and "env -i" in line for line in script)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert steps[:2] == typed and {step.split()[1] for step in steps[2:]} == {"check", "docs"}
    assert all(step.startswith("make ") for step in steps)


def test_the_suite_has_a_worker_a_core_and_a_named_file_none() -> None:
    def workers(*typed: str) -> int:
        return conftest.pytest_xdist_auto_num_workers(SimpleNamespace(args=list(typed)))

    assert 1 <= workers("tests") <= conftest.MOST_WORKERS
    assert workers(__file__) == workers(f"{__file__}::test_the_licence_is_whole") == 0
    assert os.environ["OMP_NUM_THREADS"] and os.environ["MKL_NUM_THREADS"]  # 1, unless typed
    assert {"-n auto", "--dist worksteal"} <= set(re.findall(r"-n auto|--dist worksteal", PYTEST["addopts"]))


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000
    assert PROJECT["license"] == "Apache-2.0"
