"""An attack from outside of the package is one file and one yaml. It sees the system, and never the judge."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from realera import attack, paths, train
from realera.evaluation import attacked

CODE = '''
from realera.attack_contract import Attempt


class Twice:
    """The prompt twice, and a text that would be markup and a path."""

    counts_plain = True

    def __init__(self, between: str = ", ") -> None:
        self.between = between

    @staticmethod
    def passes(settings, per_image):
        return 2 * per_image

    def __call__(self, case):
        public = [name for name in dir(case) if not name.startswith("_")]
        assert not any(hasattr(getattr(case, name), "judge") or "judge" in name for name in public)
        text = case.prompt.text
        first = case.draw([Attempt(text + self.between + text)], step=1)
        second = case.draw([Attempt("<img src=x onerror=alert(1)> ../../up")], step=2)
        return {"first": first, "second": second}
'''
YAML = """
_target_: own_attack.Twice
name: twice
between: " and "
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_attack.py").write_text(CODE)
    (tmp_path / "conf" / "attack").mkdir(parents=True)
    (tmp_path / "conf" / "attack" / "twice.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    sys.modules.pop("own_attack", None)


def _other_files(folder: Path) -> set[Path]:
    """All that does not belong to the attack. Python may cache the attack's own code, or not."""
    return {file for file in folder.rglob("*") if not {"attacks", "__pycache__"} & set(file.parts)}


@pytest.mark.slow
def test_it_runs_and_its_texts_are_only_texts(
    own: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "concept=airplane", "method=uce", "run_dir=run", *small])
    train.main()
    before = _other_files(own)
    words = ["run=run", "attack=twice", "limit=1", f"hydra.searchpath=[file://{own / 'conf'}]"]
    monkeypatch.setattr(sys, "argv", ["attack", *words, "dry_run=true"])
    attack.main()
    assert "attack twice: 1 prompt, at most 16 denoiser passes" in " ".join(capsys.readouterr().out.split())
    assert not (own / "run" / "attacks").exists()
    monkeypatch.setattr(sys, "argv", ["attack", *words])
    attack.main()
    (line,) = attacked.read(own / "run", "twice")
    if not line["plain"]:
        assert [step for step, _ in line["drawn"]] == [1, 2] and line["info"].keys() == {"first", "second"}
        assert "<img" in line["text"] or line["step"] == 1
    page = (own / "run" / paths.REPORT).read_text()
    assert "<h2>Attacks</h2>" in page and "<img src=x" not in page
    assert _other_files(own) == before
