"""The promises of every attack in conf/attack, on a random-weight model of SD 1.4's layout, in two steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from quick import slow_unless
from realera import paths
from realera.evaluation import attacked
from realera.paths import CONF_DIR
from realera.runs import attacked_system

ATTACKS = sorted(path.stem for path in (CONF_DIR / "attack").glob("*.yaml"))
# The smallest settings of an attack, and what it cannot do without.
TINY: dict[str, list[str]] = {
    "inversion": ["attack.steps=2", "attack.images=2", "attack.batch=2"],
    "complete": ["attack.steps=[0,1]"],
    "noise": ["attack.etas=[1.0,1.85]", "attack.variances=[1.04]"],
    "prompts": ["attack.csv=prompts.csv"],
    "unlearndiff": ["attack.timesteps=2", "attack.iterations=1", "attack.vocabulary=all"],
    "p4d": ["attack.steps=2", "attack.test=1", "attack.tokens=3"],
    "ring-a-bell": ["attack.population=4", "attack.generations=2", "attack.tokens=3"],
    "mma": ["attack.steps=2", "attack.candidates=8", "attack.tokens=4"],
    "relearn": ["attack.steps=[1,2]", "attack.count=2", "attack.batch=1"],
}
CSV = "case_number,adv_prompt,target_prompt,evaluation_seed\n7,big jet cat,an airplane,3\n8,sky ship,an airplane,4\n"
Type = Callable[..., None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attacked")


@pytest.fixture
def type_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Runs a command in this process, in the folder that the tests of this file share."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("REALERA_CACHE", str(place / "cache"))

    def run(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *words])
        import_module(f"realera.{name}").main()

    return run


@pytest.fixture
def erased(place: Path, type_in: Type, small: list[str]) -> str:
    """A run folder, made once."""
    if not (place / "erased" / paths.REPORT).is_file():
        (place / "prompts.csv").write_text(CSV)
        type_in("train", "concept=airplane", "method=uce", "run_dir=erased", *small)
    return "erased"


def lines_of(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines without times."""
    return [{**line, "seconds": 0} for line in attacked.read(run, name)]


def files_of(folder: Path) -> dict[str, bytes]:
    """The results of an attack that must not depend on when it ran."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith((".", "searched"))
    }


@pytest.mark.parametrize("name", slow_unless(ATTACKS, "random"))
def test_it_runs_and_goes_on_after_a_stop(
    name: str, place: Path, erased: str, type_in: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"run={erased}", f"attack={name}", "limit=2", *TINY.get(name, [])]
    type_in("attack", *words)
    run = place / erased
    lines, files = lines_of(run, name), files_of(run / "attacks" / name)
    assert len(lines) == 2
    for line in lines:
        assert line["draws"] == len(line["drawn"]) and line["shown"] == (line["step"] is not None)
        assert line["image"] is None or (run / line["image"]).is_file()
        assert line["text"] is not None or line["file"] is not None or line["image"] is None
    numbers = attacked.numbers(run)[name]
    assert json.loads((run / paths.METRICS).read_text())["attacks"][name] == numbers
    assert numbers["prompts"] == 2 and numbers["cost"]["draws"] == sum(line["draws"] for line in lines)

    with monkeypatch.context() as changed:
        changed.setattr(attacked_system.AttackedPrompt, "_draw", None)
        type_in("attack", *words)  # a finished attack draws nothing

    append = attacked.append

    def once(*given: Any) -> None:
        append(*given)
        raise KeyboardInterrupt

    (run / f"attacks/{name}.jsonl").unlink()
    with monkeypatch.context() as changed, pytest.raises(SystemExit):
        changed.setattr(attacked, "append", once)
        type_in("attack", *words)
    assert len(attacked.read(run, name)) == 1
    type_in("attack", *words)
    assert lines_of(run, name) == lines
    assert files_of(run / "attacks" / name) == files


@pytest.mark.slow
def test_other_settings_do_not_mix_with_the_old_lines(place: Path, erased: str, type_in: Type) -> None:
    words = [f"run={erased}", "attack=random", "limit=2"]
    type_in("attack", *words, "attack.name=twice")
    first = lines_of(place / erased, "twice")
    type_in("attack", *words, "attack.name=twice", "attack_seed=1")
    second = lines_of(place / erased, "twice")
    assert len(second) == 2 and {line["of"] for line in second}.isdisjoint(line["of"] for line in first)
    assert [line["text"] for line in second] != [line["text"] for line in first]


@pytest.mark.slow
def test_a_larger_limit_only_adds_prompts(place: Path, erased: str, type_in: Type) -> None:
    words = [f"run={erased}", "attack=random", "attack.name=more"]
    type_in("attack", *words, "limit=1")
    (first,) = lines_of(place / erased, "more")
    type_in("attack", *words, "limit=2")
    assert lines_of(place / erased, "more")[0]["text"] == first["text"]
    type_in("attack", *words, "limit=1")
    assert len(attacked.read(place / erased, "more")) == 2, "a smaller limit deletes nothing"
    assert attacked.numbers(place / erased)["more"]["prompts"] == 1


@pytest.mark.slow
def test_the_unedited_model_is_attacked_as_a_control(place: Path, type_in: Type, small: list[str]) -> None:
    type_in("attack", "run=original", "concept=airplane", "run_dir=control", "limit=2", *small[:-1])
    numbers = attacked.numbers(place / "control")["random"]
    assert numbers["pre_asr"] == numbers["original"] and torch.isfinite(torch.tensor(numbers["asr"]["value"]))
    assert (place / "control" / paths.REPORT).is_file()
