"""Several runs drawn from the same noise in one copy of the base model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from realera.contracts import UserError
from realera.runs import folders, steps, together
from realera.runs.folders import Run
from realera.runs.side_by_side import SideBySide
from realera.settings.instantiate import build

PROMPT = "a photo of the airplane"


@dataclass
class Wish:
    methods: list[str]
    prompt: str = PROMPT
    negative: str = ""
    seeds: list[int] = field(default_factory=lambda: [3, 4])
    steps: int = 2
    guidance: float = 5.0


@pytest.fixture(scope="module")
def runs(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A closed form, and a guide that counts in sampler steps."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("REALERA_CACHE", str(place / "cache"))
        for method in ("uce", "sld"):
            words = ["concept=airplane", f"method={method}", "evaluate=false", f"run_dir={method}", *small]
            patch.setattr(sys, "argv", ["train", *words])
            import_module("realera.train").main()
    return [folders.open_run(str(place / method)) for method in ("uce", "sld")]


@pytest.mark.slow
def test_each_model_draws_the_images_of_its_own_run(runs: list[Run]) -> None:
    """In any order: the weights of one run leave nothing behind for the next."""
    models = SideBySide(runs)
    sampler = models.backbone.sampler
    for methods in (["uce", "sld"], ["sld"], ["uce"]):
        wish = Wish(methods, steps=sampler.steps, guidance=sampler.guidance_scale, seeds=[3])
        drawn = {name: np.stack(pictures) for name, pictures in models.draw(wish)}
        assert list(drawn) == ["original", *methods]
        for name in methods:
            run = models.runs[name]
            alone = steps.pairs_from(steps.load_run(run), run.settings)(PROMPT, 3)
            assert np.array_equal(drawn[name][0], alone["erased"].numpy())
            assert np.array_equal(drawn["original"][0], alone["original"].numpy())
            assert not np.array_equal(drawn[name], drawn["original"])


@pytest.mark.slow
def test_negative_prompt_steps_and_guidance_act_on_all_models(runs: list[Run]) -> None:
    models = SideBySide(runs)

    def drawn(**changes: Any) -> dict[str, Any]:
        return {name: np.stack(pictures) for name, pictures in models.draw(Wish(["uce", "sld"], **changes))}

    plain = drawn()
    for changes in ({"negative": "a cat"}, {"steps": 3}, {"guidance": 2.0}):
        other = drawn(**changes)
        for name in plain:
            assert not np.array_equal(plain[name], other[name]), (name, changes)
    assert all(pictures.shape == (2, 32, 32, 3) for pictures in plain.values())
    assert np.array_equal(plain["uce"], drawn()["uce"])


def test_a_guide_counts_in_the_steps_that_are_drawn_with(runs: list[Run]) -> None:
    models = SideBySide(runs)
    guide: Any = models._guide("sld", 20)
    assert guide.steps == 20 and guide.warmup == build({**runs[1].config["method"]["guide"], "steps": 20}).warmup
    assert models._guide("uce", 20) is None


def test_every_step_is_told_and_an_exception_in_it_stops(runs: list[Run]) -> None:
    models = SideBySide(runs)
    models.at_once = 1
    told: list[tuple[int, int]] = []
    names = [name for name, _ in models.draw(Wish(["uce", "sld"]), lambda done, total: told.append((done, total)))]
    assert names == ["original", "uce", "sld"] and told == [(done, 12) for done in range(12)]

    def stop(done: int, total: int) -> None:
        if done == 5:  # in the second model
            raise KeyError("stopped")

    seen = []
    with pytest.raises(KeyError, match="stopped"):
        for name, _ in models.draw(Wish(["uce"]), stop):
            seen.append(name)
    assert seen == ["original"] and not models._turn.locked()
    assert [name for name, _ in models.draw(Wish(["uce"]))] == ["original", "uce"], "it draws on afterwards"


def test_a_full_memory_is_a_sentence(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    models = SideBySide(runs)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(models.backbone, "generate", full)
    with pytest.raises(UserError, match="draw fewer images at once"):
        list(models.draw(Wish(["uce"])))
    with pytest.raises(UserError, match="stop other programs"):
        list(models.draw(Wish(["uce"], seeds=[1])))


def fake(folder: Path, method: str = "uce", concept: str = "cat", pretrained: str | None = None) -> Any:
    backbone = {"name": "mini", "pretrained": pretrained}
    return Run(folder, {"method": {"name": method}, "concept": concept, "backbone": backbone})


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (lambda place: fake(place / "a", "rece"), "is given twice"),
        (lambda place: fake(place / "b", "original"), "erased nothing"),
        (lambda place: fake(place / "b", "rece", pretrained="x/y"), "another base model"),
    ],
)
def test_runs_that_do_not_fit_together_are_refused(second: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        together.check([fake(tmp_path / "a"), second(tmp_path)])
    together.check([fake(tmp_path / "a"), fake(tmp_path / "b")])


def test_weights_of_other_base_weights_are_refused(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    from realera.backbones.unet import UNetBackbone

    monkeypatch.setattr(UNetBackbone, "fingerprint", "other")
    with pytest.raises(UserError, match="another base model"):
        SideBySide(runs)


def test_names_are_short_and_different(tmp_path: Path) -> None:
    def names(*given: tuple[str, str]) -> list[str]:
        return together.names_of([fake(tmp_path / f"run-{i}", *one) for i, one in enumerate(given)])

    assert names(("uce", "cat"), ("rece", "cat")) == ["uce", "rece"]
    assert names(("uce", "cat"), ("uce", "dog")) == ["uce, cat", "uce, dog"]
    assert names(("uce", "cat"), ("uce", "cat")) == ["run-0", "run-1"]
    twins = [fake(tmp_path / "a" / "run"), fake(tmp_path / "b" / "run")]
    assert together.names_of(twins) == ["1: uce", "2: uce"]


def test_the_texts_name_every_concept_once(tmp_path: Path) -> None:
    said = together.texts([fake(tmp_path, "uce", "cat"), fake(tmp_path, "rece", "cat"), fake(tmp_path, "sa", "dog")])
    assert said["title"] == "cat and dog, before and after" and said["prompt"] == "a photo of the cat"
    assert said["about"] == "uce, rece, sa on mini; all start from the same noise."
