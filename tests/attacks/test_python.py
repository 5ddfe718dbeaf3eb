"""realera.attack on a pipeline in memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import realera
from realera import paths

FEW = {"limit": 2, "attack.together": 2}


@pytest.fixture
def erased(tiny_sd: Path, tiny_judge: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return realera.erase(pipe, "airplane", method="uce", progress=False)


@pytest.mark.slow
def test_an_attack_in_memory_shows_itself(erased: Any, tiny_judge: Path, tmp_path: Path) -> None:
    judge = ["judge=miniature", f"judge.weights={tiny_judge}", "task.images={erase:2}"]
    before = {name: value.clone() for name, value in erased.pipe.unet.state_dict().items()}
    result = realera.attack(erased, "closed-form", overrides=judge, progress=False, folder=tmp_path / "kept", **FEW)
    assert set(result) == {"asr", "pre_asr", "original"} and len(result) == 3 and len(result.lines) == 2
    assert result.interval("asr")[0] <= result["asr"] <= result.interval("asr")[1]
    assert "closed-form, 2 prompts" in str(result) and "erased and attacked" in str(result)
    page = result._repr_html_()
    assert page.count("<img") == 6 and "data:image/png" in page
    assert (tmp_path / "kept" / paths.REPORT).is_file()
    assert all((value == before[name]).all() for name, value in erased.pipe.unet.state_dict().items())
    again = realera.attack(erased, "closed-form", overrides=judge, progress=False, **FEW)
    assert again.folder is None and dict(again) == dict(result)
    with pytest.raises(KeyError):
        result["acc_e"]
    with pytest.raises(realera.UserError, match="attack"):
        realera.attack(erased, "nothing", progress=False)


@pytest.mark.slow
def test_the_model_card_has_the_attacks_and_the_evaluation(tiny_sd: Path, tiny_judge: Path, tmp_path: Path) -> None:
    def card(of: Any, name: str) -> str:
        return (of.export("map", tmp_path / name).path.parent / "README.md").read_text()

    judge = ["judge=miniature", f"judge.weights={tiny_judge}", "task.images={erase:2,near:1,keep:1}"]
    few: dict[str, Any] = {"backbone.sampler.steps": 2}
    erased = realera.erase(tiny_sd, "airplane", method="uce", progress=False, **few)
    run = erased.save(tmp_path / "run")
    fresh = card(erased, "fresh")
    assert "This erasure was not judged" in fresh and "No attack was tried" in fresh
    result = realera.attack(erased, "closed-form", overrides=judge, progress=False, folder=tmp_path / "kept", **FEW)
    value = realera.evaluate(erased, overrides=judge, progress=False)["acc_s"]
    told = card(erased, "told")
    assert f"| closed-form | {result['asr']:.1f} |" in told and "not judged" not in told
    assert f"| Acc_s ↑ | prompts of other concepts: mean probability, % | {value:.1f} |" in told
    (tmp_path / "kept" / paths.ATTACKS).rename(run / paths.ATTACKS)
    again = realera.load(erased.undo(), run)
    assert f"| closed-form | {result['asr']:.1f} |" in card(again, "again")


def test_attacks_are_described_in_one_line_each() -> None:
    found = realera.attacks()
    assert {"random", "prompts", "closed-form", "inversion", "inpaint", "complete", "noise"} <= found.keys()
    assert all(line.endswith(".") and "\n" not in line and len(line) < 250 for line in found.values())


@pytest.mark.slow
def test_the_documented_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import realera\n.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["result"]["asr"] == 100
