"""Command lines of several bad settings at once, through the real commands: one sentence, exit status 2, no folder."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import walk
from quick import slow_unless
from realera import cli
from realera.settings import composition

TYPED = ("null", "true", "abc", "-1", "0", "1e308", "nan", ".inf", "1e20", "[]", "{a:1}", "''", "1,2", "${seed}", "???")
LINES = {
    "train": ["concept=airplane", "backbone=mini", "dry_run=true", "logger=none"],
    "evaluate": ["run=original", "concept=airplane", "backbone=mini", "dry_run=true"],
    "generate": ["run=nowhere", "prompts=[a]"],
    "export": ["run=nowhere", "to=map", "out=made"],
    "apply": ["map=nowhere", "pretrained=mini", "out=made"],
    "report": ["runs=[nowhere]"],
    "demo": ["run=nowhere"],
    "cache": ["captions=nowhere", "backbone=mini"],
    "dashboard": ["dry_run=true"],
    "residue": ["run=nowhere"],
    "attack": ["run=original", "concept=airplane", "backbone=mini", "dry_run=true"],
}
OPTIONS = ("method=uce", "method=mace", "method=sa", "method=sld", "task=style", "judge=clip", "trainer=ddp", "+x.y=1")
_known: dict[str, list[str]] = {}


def keys(door: str) -> list[str]:
    """Every setting of a command by its dotted name, and every group of them."""
    if door not in _known:
        config = composition.plain(walk.composed(door))
        places = [*walk.leaves(config), *walk.groups_of(config)]
        _known[door] = [".".join(place) for place in places if all(isinstance(key, str) for key in place)]  # type: ignore[arg-type]
    return _known[door]


@st.composite
def lines(draw: Any) -> list[str]:
    """A command, and two to five settings of it that are odd."""
    door = draw(st.sampled_from(sorted(LINES)))
    odd = draw(st.lists(st.tuples(st.sampled_from(keys(door)), st.sampled_from(TYPED)), min_size=2, max_size=5))
    words = [f"~{key}" if draw(st.integers(0, 9)) == 0 else f"{key}={value}" for key, value in odd]
    more = [draw(st.sampled_from(OPTIONS))] if door in ("train", "evaluate") and draw(st.booleans()) else []
    return [door, *LINES[door], *more, *words]


def typed(door: str, words: list[str]) -> object:
    """The exit status of a command in this process."""
    GlobalHydra.instance().clear()
    before, sys.argv = sys.argv, [door, *words]
    try:
        import_module(f"realera.{door}").main()
    except SystemExit as left:
        return left.code
    finally:
        sys.argv = before
    return 0


def refused(line: list[str], capsys: Any, place: Path) -> bool:
    """Whether a line was refused, in one sentence; it is accepted else, and either way leaves nothing behind."""
    status = typed(line[0], line[1:])
    said = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert status in (0, 2), (line, status)
    assert len(said) == (status == 2), (line, said)
    assert not list(place.iterdir()), line
    return status == 2


def tried(count: int, place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many of so many lines are refused."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("REALERA_STAMP", "stamp")
    met: list[bool] = []

    @seed(0)
    @settings(
        max_examples=count,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(lines())
    def each(line: list[str]) -> None:
        met.append(refused(line, capsys, place))

    each()
    with capsys.disabled():
        print(f"\n{len(met)} command lines of several odd settings: {sum(met)} refused, {len(met) - sum(met)} accepted")
    return sum(met)


def test_some_lines(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(12, tmp_path, capsys, monkeypatch) > 7


@pytest.mark.slow
def test_two_hundred_lines(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(200, tmp_path, capsys, monkeypatch) > 150


HEAVY = ("torch", "numpy", "diffusers", "transformers", "lightning", "wandb", "peft", "PIL")
BAD = [
    ("train", "concept=airplane", "method.align.lr=1e308", "seed=0"),
    ("train", "concept=1.5", "task.images.erase=1e20"),
    ("train", "concept=airplane", "~task", "method=mace"),
    ("train", "concept=airplane", "trainer.accelerator=tpu", "method.edit=5"),
    ("train", "-m", "concept=airplane", "trainer.devices=99"),
    ("evaluate", "run=original", "concept=airplane", "dry_run=maybe"),
    ("generate", "run=x", "prompts=[a]", "seeds=[1e23]"),
    ("export", "run=x", "to=lora", "rank=99999999", "out=y"),
    ("demo", "port=99999"),
    ("apply", "map=x", "pretrained=mini", "out=y", "weight=[0.5,-1]"),
    ("apply", "map=x", "pretrained=nowhere", "out=y"),
    ("dashboard", "kind=reprt", "tags={a:1}"),
]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("line",),
    slow_unless([(line,) for line in BAD], *((line,) for line in BAD[::3])),
    ids=lambda line: " ".join(line)[:60],
)
def test_a_refusal_loads_nothing_heavy(line: tuple[str, ...], tmp_path: Path) -> None:
    """As a process of its own. Without what takes seconds to import, it ends within two where nothing else runs."""
    watch = (
        f"import atexit, sys\natexit.register(lambda: print([n for n in {HEAVY!r} if n in sys.modules]))\n"
        f"from realera.{line[0]} import main\nsys.argv = {list(line)!r}\nmain()"
    )
    source = str(Path(cli.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", watch],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "error: " in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "-m" in line or not list(tmp_path.iterdir())
