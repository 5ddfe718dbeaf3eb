"""Which part of realera may import which, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import realera

ROOT = Path(realera.__file__).parent
COMMANDS = {
    "train",
    "evaluate",
    "generate",
    "export",
    "apply",
    "report",
    "demo",
    "cache",
    "dashboard",
    "residue",
    "attack",
}
BASE = {"contracts", "attack_contract", "method_roles", "paths", "setting_types"}
MATHEMATICS = {"closed_form", "value_space", "mining"}
FOUNDATION = BASE | {"system", "files"}
# What each part of realera may import besides itself: a part comes after all that it may import, so there is no circle.
MAY = {
    "__init__": {
        "system",
        "contracts",
        "api",
        "applied",
        "evaluation",
    },  # the last four for types, or when they are asked for
    "callable_module": set[str](),
    "setting_types": set[str](),
    "contracts": {"setting_types", "text_states", "records"},
    "records": {"setting_types", "text_states"},
    "text_states": set[str](),
    "attack_contract": {"contracts"},
    "method_roles": {"contracts"},
    "paths": {"contracts"},
    "system": BASE,
    "files": BASE | {"system"},
    **dict.fromkeys(MATHEMATICS, BASE),
    "tasks": FOUNDATION | {"callable_module"},
    "settings": FOUNDATION | {"tasks"},
    "costs": FOUNDATION,
    "backbones": FOUNDATION,
    "methods": FOUNDATION | MATHEMATICS | {"callable_module"},  # not judges: a method cannot see its judge
    "attacks": FOUNDATION | {"methods", "tasks", "callable_module"},  # not judges: an attack asks, and is told
    "judges": FOUNDATION | {"settings"},
    "training": FOUNDATION | {"closed_form", "costs", "settings"},
    "evaluation": FOUNDATION,  # not methods: ours and a rival's images are judged alike
    "reporting": FOUNDATION | {"costs", "evaluation", "settings"},
    "console": FOUNDATION | {"settings", "costs", "evaluation", "reporting"},
    "miniature": FOUNDATION | {"tasks", "backbones", "judges", "evaluation"},  # makes the model; nothing imports it
}
MAY["runs"] = set(MAY) - {"__init__", "__main__", "miniature", "reporting"}
MAY["sweeps"] = MAY["runs"] | {"runs", "reporting"}
MAY["exporting"] = MAY["runs"] | {"runs"}
MAY["tracking"] = MAY["sweeps"] | {"sweeps"}
MAY["applied"] = MAY["runs"] | {"runs"}
MAY["cli"] = MAY["sweeps"] | {"sweeps"}
MAY["__main__"] = {"system", "cli"} | COMMANDS
MAY["api"] = MAY["runs"] | {"runs", "reporting", "exporting", "applied"}
MAY |= dict.fromkeys(COMMANDS, MAY["tracking"] | {"tracking", "cli", "exporting"})
WORKSHOP = "miniature"
HYDRA = {"settings", "runs", "sweeps", "tracking", "cli"} | COMMANDS
LIBRARIES = {  # where a library may be imported; what makes the miniature is free
    "hydra": HYDRA,
    "omegaconf": HYDRA,
    "lightning": {"training", "tracking"},
    "wandb": {"training", "tracking", "dashboard"},
    "wandb_workspaces": {"dashboard", "tracking"},
    "diffusers": {"backbones", "api", "applied"},  # there for its types alone
    "peft": {"backbones"},
    "open_clip": {"judges"},
    "nudenet": {"judges"},
    "onnxruntime": {"judges"},
    "torch_fidelity": {"judges"},
    "matplotlib": {"reporting"},
    "gradio": {"reporting"},
}
LATE = {
    "open_clip",
    "nudenet",
    "onnxruntime",
    "torch_fidelity",
    "torchvision",
    "matplotlib",
    "wandb_workspaces",
    "gradio",
}  # inside functions only: composing a config never needs them
LONGEST, LONGEST_COMMAND = 600, 120  # lines
FILES = sorted(ROOT.rglob("*.py"))


def place_of(file: Path) -> str:
    """A room's name, or a top-level module's ("__init__" of the package itself: the shared version)."""
    first = file.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is imported when the module is) for every import. `from a import b` gives "a.b"."""
    tree = ast.parse(source)
    late = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", id(node) not in late) for alias in node.names)


def faults(place: str, source: str) -> list[str]:
    """What a module of `place` imports and must not."""
    found = []
    for name, early in imports(source):
        library, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if library == "realera" and part and part != place and not part.startswith("__") and part not in MAY[place]:
            found.append(f"{place} imports {name}")
        if place != WORKSHOP and library in LIBRARIES and place not in LIBRARIES[library]:
            found.append(f"{place} imports {library}")
        if place != WORKSHOP and library in LATE and early:
            found.append(f"{place} imports {library} before it is needed")
    return found


def test_every_place_is_known() -> None:
    assert {place_of(file) for file in FILES} == set(MAY), "say in this test what a new part may import"


def test_there_is_no_circle() -> None:
    placed: set[str] = set()
    while left := {place: others - placed for place, others in MAY.items() if place not in placed}:
        free = {place for place, others in left.items() if not others & set(left) - {place}}
        assert free, f"each of these may import another of them: {sorted(left)}"
        placed |= free


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    assert not faults(place_of(file), file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_short(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= (LONGEST_COMMAND if place_of(file) in COMMANDS else LONGEST)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("methods", "from realera.judges import clip"),
        ("evaluation", "from realera.methods.uce import UnifiedConceptEdit"),
        ("evaluation", "import hydra"),
        ("methods", "def f():\n    import diffusers"),
        ("contracts", "from realera.mining.band import Band"),
        ("train", "from realera.evaluate import evaluate"),
        ("backbones", "from realera.miniature.world import World"),
        ("judges", "import open_clip"),
        ("tasks", "import wandb"),
    ],
)
def test_the_walk_sees_what_it_must(place: str, source: str) -> None:
    assert faults(place, source)


def test_the_walk_lets_pass_what_is_right() -> None:
    lines = ["import torch", "from realera import paths", "from realera.methods import latents"]
    source = "\n".join([*lines, "from realera.closed_form import NormalEquations"])
    assert not faults("methods", source)
    assert not faults("judges", "class Judge:\n    def __init__(self):\n        import open_clip")
