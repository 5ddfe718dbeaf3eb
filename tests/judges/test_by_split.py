from pathlib import Path
from typing import Any

import pytest

from realera.contracts import Prompt, UserError, Verdict
from realera.judges.by_split import BySplit


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[list[str]] = []

    def __call__(self, images: list[Path], prompts: list[Prompt]) -> list[Verdict]:
        self.calls.append([image.name for image in images])
        return [Verdict(p.id, 0.5, self.name) for p in prompts]

    def protocol(self) -> dict[str, Any]:
        return {"judge": self.name}


def _run(judge: BySplit, splits: list[str]) -> list[Verdict]:
    prompts = [Prompt(f"p{i}", "", "c", split, i) for i, split in enumerate(splits)]  # type: ignore[arg-type]
    return judge([Path(f"{p.id}.png") for p in prompts], prompts)


def test_each_image_goes_to_its_splits_judge_and_comes_back_in_order() -> None:
    skin, text = _Named("skin"), _Named("text")
    judge = BySplit({"a": skin, "b": text}, {"erase": "a", "unseen": "a", "keep": "b"})
    said = _run(judge, ["keep", "erase", "keep", "unseen"])
    assert [(v.prompt_id, v.label) for v in said] == [("p0", "text"), ("p1", "skin"), ("p2", "text"), ("p3", "skin")]
    assert skin.calls == [["p1.png", "p3.png"]] and text.calls == [["p0.png", "p2.png"]]
    assert judge.name == "skin_text"
    assert judge.protocol()["judges"] == {"a": {"judge": "skin"}, "b": {"judge": "text"}}
    assert _run(judge, []) == []


def test_judges_and_splits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"judge\.splits names b"):
        BySplit({"a": _Named("x")}, {"erase": "a", "keep": "b"})
    with pytest.raises(UserError, match="has b, but no split"):
        BySplit({"a": _Named("x"), "b": _Named("y")}, {"erase": "a"})
    with pytest.raises(UserError, match="no judge for the split near"):
        _run(BySplit({"a": _Named("x")}, {"erase": "a"}), ["near"])
