"""Who may import whom (src/realera is a house: rooms, doors, and the shared top level), and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import realera

ROOT = Path(realera.__file__).parent
ROOMS = {"tasks", "backbones", "methods", "judges", "training", "evaluation", "miniature"}
DOORS = {"train", "evaluate", "generate", "export", "report", "demo", "cache", "dashboard", "residue"}
DOOR_PARTS = {
    "cli",
    "complaints",
    "preflight",
    "runs",
    "repairs",
    "console",
    "steps",
    "tracking",
    "portable",
    "webpage",
    "processes",
    "captions",
    "panels",
    "sweep",
    "jobs",
    "study",
    "judged",
    "plan",
    "shelf",
    "lengths",
    "devices",
    "output",
    "surroundings",
    "trust",
    "schema",
    "settings",
    "values",
    "sources",
    "constructors",
    "matching",
    "hub",
    "composed",
    "starting",
    "remains",
}
SHARED = {"contracts", "paths", "seals", "disk", "locks", "interrupts", "ranks", "ledger", "costs", "finite"}
SHARED |= {"foreign", "shapes", "parts", "pictures", "kinds", "reach", "reading"}
SOLVERS = {"value_space", "closed_form", "neighbours", "band", "polar"}  # pure mathematics at the top level
WORKSHOP = "miniature"  # makes the built-in model: may use every room and library, and no room uses it
LIBRARIES = {  # where a library may be imported; the workshop is free
    "hydra": DOORS | DOOR_PARTS,
    "omegaconf": DOORS | DOOR_PARTS,
    "lightning": DOORS | DOOR_PARTS | {"training"},
    "wandb": DOORS | DOOR_PARTS | {"training"},
    "wandb_workspaces": DOORS | DOOR_PARTS,
    "diffusers": {"backbones"},
    "peft": {"backbones"},
    "open_clip": {"judges"},
    "nudenet": {"judges"},
    "onnxruntime": {"judges"},
    "torch_fidelity": {"judges"},
    "matplotlib": {"evaluation"},
}
LATE = {
    "open_clip",
    "nudenet",
    "onnxruntime",
    "torch_fidelity",
    "torchvision",
    "matplotlib",
    "wandb_workspaces",
}  # inside functions only: composing a config never needs them
LONGEST, LONGEST_DOOR = 320, 100  # lines
LONGER = {"contracts": 440, "runs": 400}  # one file by design: the file to read first
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


def allowed(place: str) -> set[str]:
    """The parts of realera that a place may import besides itself."""
    if place in DOORS | DOOR_PARTS:
        return DOOR_PARTS | SHARED | SOLVERS | ROOMS - {WORKSHOP}
    if place == WORKSHOP:
        return ROOMS | SHARED | SOLVERS
    if place in ROOMS | SOLVERS:
        return SHARED | SOLVERS
    return SHARED


def faults(place: str, source: str) -> list[str]:
    """What a module of `place` imports and must not."""
    found = []
    for name, early in imports(source):
        library, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if library == "realera" and part and part != place and not part.startswith("__") and part not in allowed(place):
            found.append(f"{place} imports {name}")
        if place != WORKSHOP and library in LIBRARIES and place not in LIBRARIES[library]:
            found.append(f"{place} imports {library}")
        if place != WORKSHOP and library in LATE and early:
            found.append(f"{place} imports {library} before it is needed")
    return found


def test_every_place_is_known() -> None:
    unknown = (
        {place_of(file) for file in FILES} - ROOMS - DOORS - DOOR_PARTS - SHARED - SOLVERS - {"__init__", "__main__"}
    )
    assert not unknown, f"say in this test what these may import: {unknown}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    assert not faults(place_of(file), file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_short(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGER.get(place_of(file), LONGEST_DOOR if place_of(file) in DOORS else LONGEST)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("methods", "from realera.judges import clip"),
        ("evaluation", "from realera.methods.uce import UnifiedConceptEdit"),
        ("evaluation", "import hydra"),
        ("methods", "def f():\n    import diffusers"),
        ("contracts", "from realera.band import Band"),
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
