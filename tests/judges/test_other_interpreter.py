"""A judge in another interpreter, whose environment has no torch, numpy or realera."""

import json
import math
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest

from realera.contracts import Prompt, SetJudge, UserError
from realera.judges import worker
from realera.judges.other_interpreter import RemoteJudge, RemoteSetJudge, with_interpreters

STUB = """
import os, sys, time
from realera.contracts import UserError, Verdict

class Stub:
    name = "stub"
    def __init__(self, word="w", inner=None, fail=None, batch=None):
        print("loading, please wait")          # a library that talks on stdout
        os.write(1, b"and C code too\\n{\\"realera\\": 1}\\n")
        self.word, self.inner, self.fail, self.batch = word, inner, fail, batch
        if fail == "build": raise ImportError("No module named 'somelib'\\nmore")
        if fail == "user": raise UserError("the weights are missing: fetch them.")
        if fail == "crash": sys.stderr.write("segmentation fault, say\\n"); os._exit(139)
    def __call__(self, images, prompts):
        print("0%|      | judging")
        if self.fail == "late": raise ValueError("bad picture")
        if self.fail == "slow": time.sleep(60)
        assert not any(name in sys.modules for name in ("torch", "numpy", "hydra"))
        return [Verdict(p.id, float("nan") if p.concept == "none" else 0.25, self.word,
                        {"file": i.name, "size": p.size, "python": sys.prefix, "of": len(images)})
                for i, p in zip(images, prompts)]
    def protocol(self): return {"judge": self.name, "inner": self.inner and self.inner.word}

class Set(Stub):
    def compare(self, images, references): return {"fid": float(len(images) - len(references))}
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment whose only package is the stub judge."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.EnvBuilder(symlinks=True).create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "stub_judge.py").write_text(STUB)
    return folder / "bin" / "python"


@pytest.fixture(autouse=True)
def _stub_in_this_interpreter(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(next(python.parents[1].glob("lib/python*/site-packages"))))


def _node(kind: str = "Stub", **settings: Any) -> dict[str, Any]:
    return {"_target_": f"stub_judge.{kind}", **settings}


def _ask(judge: RemoteJudge, count: int = 3) -> list[Any]:
    prompts = [Prompt(f"p{i}", "text", "none" if i == 1 else "cat", "erase", i, size=(8, 16)) for i in range(count)]
    return judge([Path(f"{i}.png") for i in range(count)], prompts)


def test_answers_equal_the_judge_s_own_despite_printed_output(python: Path) -> None:
    judge = RemoteJudge(_node(word="é", inner=_node(word="in"), batch=2), str(python))
    assert (judge.name, judge.protocol()) == ("stub", {"judge": "stub", "inner": "in"})
    said = _ask(judge)
    assert [v.prompt_id for v in said] == ["p0", "p1", "p2"] and said[0].label == "é"
    assert [math.isnan(v.value) for v in said] == [False, True, False]
    assert [v.detail["of"] for v in said] == [2, 2, 1], "as many at once as its own batch"
    assert said[0].detail["size"] == [8, 16]  # a tuple there, JSON here
    assert said[0].detail["python"] == str(python.parents[1]) != sys.prefix
    process = judge._process
    del judge
    assert process.poll() == 0, "it ends with the judge"


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ("build", r"Stub failed in .*python \(ImportError: No module named 'somelib'\): install its libraries there$"),
        ("user", r"^the weights are missing: fetch them\. \(judge\.python=.*python\)$"),
        ("crash", "ended without an answer: segmentation fault, say$"),
    ],
)
def test_errors_while_loading_are_one_sentence(python: Path, fail: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        RemoteJudge(_node(fail=fail), str(python))


def test_later_errors_are_one_sentence(python: Path) -> None:
    judge = RemoteJudge(_node(fail="late"), str(python))
    with pytest.raises(UserError, match="ValueError: bad picture"):
        _ask(judge)
    with pytest.raises(UserError, match="bad picture"):
        _ask(judge)  # the process is still running


def test_a_judge_that_does_not_answer_is_stopped(python: Path) -> None:
    judge = RemoteJudge(_node(fail="slow"), str(python))
    judge.patience = 0.2
    start = time.monotonic()
    with pytest.raises(UserError, match=r"did not answer within 0\.2 s"):
        _ask(judge)
    assert judge._process.poll() is not None and time.monotonic() - start < 10


def test_a_program_that_is_not_an_interpreter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a program"):
        RemoteJudge(_node(), str(tmp_path / "python"))
    with pytest.raises(UserError, match="ended without an answer"):
        RemoteJudge(_node(), "false")


def test_a_missing_library_of_a_real_judge_is_named(python: Path) -> None:
    with pytest.raises(UserError, match=r"No module named 'nudenet'"):
        RemoteJudge({"_target_": "realera.judges.nudenet.NudeNetJudge"}, str(python))


def test_python_is_read_at_any_depth_of_the_config(python: Path) -> None:
    assert with_interpreters(_node(python=None, word="a")) == _node(word="a")
    node = {"_target_": "x.BySplit", "judges": {"a": _node(python=str(python)), "b": _node("Set", python="py")}}
    inner = with_interpreters(node)["judges"]
    assert inner["a"] == {
        "_target_": "realera.judges.other_interpreter.RemoteJudge",
        "node": json.dumps(_node()),
        "python": str(python),
    }
    assert inner["b"]["_target_"].endswith(".RemoteSetJudge")


def test_a_set_judge_runs_in_the_other_interpreter(python: Path) -> None:
    judge = RemoteSetJudge(_node("Set"), str(python))
    assert judge.compare([Path("a.png")] * 3, [Path("b.png")]) == {"fid": 2.0}
    assert isinstance(judge, SetJudge) and not hasattr(RemoteJudge, "compare")


def test_the_judges_load_without_any_library(python: Path) -> None:
    """Their modules are imported there before their libraries."""
    names = [f.stem for f in Path(worker.__file__).parent.glob("*.py") if not f.stem.endswith("_net")]
    code = f"import importlib\nfor name in {names}: importlib.import_module('realera.judges.' + name)"
    root = Path(worker.__file__).parents[2]
    subprocess.run([python, "-S", "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"], check=True)


def test_the_other_interpreter_imports_nothing_of_the_current_folder(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("importlib", "json", "stub_judge", "realera"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    RemoteJudge({"_target_": "stub_judge.Stub"}, str(python)).close()
    assert not (tmp_path / "imported").exists()


ANSWERS = {
    "no result": ({"realera": 1}, "with neither a result nor an error"),
    "a number": ({"realera": 1, "said": 5}, "something else than a list of verdicts"),
    "nothing": ({"realera": 1, "said": []}, "do not match the images"),
    "other images": ({"prompt_id": "other"}, "do not match the images"),
    "a word for a number": ({"value": "x"}, "something else than a list of verdicts"),
    "infinity": ({"value": math.inf}, "something else than a list of verdicts"),
    "a score of NaN": ({"detail": {"score": math.nan}}, "something else than a list of verdicts"),
    "a NaN further in": ({"detail": {"top": [["a", math.nan]]}}, "NaN or infinity in the detail of the image 0.png"),
    "too many digits": ({"detail": {"n": 10**99}}, "with neither a result nor an error"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_invalid_answer_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    answer, why = ANSWERS[case]
    row = {"prompt_id": "p0", "value": 0.5, "label": "cat", "detail": {}, **answer}
    said = answer if "realera" in answer else {"realera": 1, "said": [row]}
    judge = RemoteJudge(
        _node(), _fake_interpreter(tmp_path, {"realera": 1, "said": {"name": "n", "protocol": {}}}, said)
    )
    with pytest.raises(UserError, match=f"the judge in .*python answered .*{why}") as met:
        _ask(judge, 1)
    assert "\n" not in str(met.value)


@pytest.mark.parametrize(
    "about",
    [
        5,
        None,
        {"name": 5, "protocol": {}},
        {"name": "n"},
        {"name": "../n", "protocol": {}},
        {"name": "n", "protocol": {"threshold": math.nan}},
    ],
)
def test_a_judge_must_return_a_valid_name_and_protocol(about: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the judge in .*python answered without a valid name and protocol"):
        RemoteJudge(_node(), _fake_interpreter(tmp_path, {"realera": 1, "said": about}))


def test_a_comparison_must_return_finite_numbers(tmp_path: Path) -> None:
    about = {"realera": 1, "said": {"name": "n", "protocol": {}}}
    for said in (5, {"fid": math.nan}, {"fid": "x"}):
        judge = RemoteSetJudge(_node("Set"), _fake_interpreter(tmp_path, about, {"realera": 1, "said": said}))
        with pytest.raises(UserError, match="something else than finite numbers"):
            judge.compare([Path("a.png")], [Path("b.png")])


def test_the_worker_answers_protocol_and_knows() -> None:
    class Knowing:
        name, detects = "k", True

        def protocol(self) -> dict[str, Any]:
            return {}

        def knows(self, concept: str) -> bool:
            return concept == "cat"

    assert worker.answer(Knowing(), "protocol", {}) == {"name": "k", "protocol": {}, "names": True, "detects": True}
    assert [worker.answer(Knowing(), "knows", {"concept": c}) for c in ("cat", "dog")] == [True, False]


def _fake_interpreter(folder: Path, *answers: Any) -> str:
    """A program that returns the given answers one after the other to any requests."""
    program = folder / "python"
    lines = "".join(f"read -r _; cat <<'END'\n{json.dumps(answer)}\nEND\n" for answer in answers)
    program.write_text(f"#!/bin/sh\n{lines}")
    program.chmod(0o755)
    return str(program)
