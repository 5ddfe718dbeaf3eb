"""Attacks on systems of other kinds: with a guide, with adapters for each concept, fine-tuned, of another layout."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from realera import paths
from realera.attack_contract import Attempt
from realera.contracts import Concept, NamedPrompt, Prompt, Verdict
from realera.evaluation import attacked
from realera.methods.sld import SafetyGuidance
from realera.methods.spm import FacilitatedTransport, permeability
from realera.runs.attacked_system import AttackedPrompt, System, typed

METHODS = ("sld", "spm", "sa", "esd-u", "mace")


class Eye:
    """A judge that notes what it sees."""

    name = "eye"

    def __init__(self, label: str = "cat") -> None:
        self.label = label
        self.seen: list[Path] = []

    def __call__(self, images: Any, prompts: Any) -> list[Verdict]:
        self.seen += images
        return [Verdict(prompt.id, 0.9, self.label) for prompt in prompts]

    def protocol(self) -> dict[str, Any]:
        return {"judge": self.name}


def case_of(backbone: Any, tmp_path: Path, guide: Any = None, judge: Any = None) -> AttackedPrompt:
    prompt = Prompt("erase-cat-0000", "a photo of the cat", "cat", "erase", 0)
    names = [NamedPrompt.of("a photo of the {}", "cat")]
    system = System(backbone, guide, judge or Eye(), "top1", 4, 0)
    draw = torch.Generator().manual_seed(0)
    return AttackedPrompt(
        system, Concept("cat", "field"), [prompt], names, draw, prompt, False, {}, tmp_path / "none.png", tmp_path
    )


def test_the_system_draws_with_its_guide(new_backbone: Any, tmp_path: Path) -> None:
    backbone = new_backbone()
    guide = SafetyGuidance("cat", strength="max", steps=2)
    case = case_of(backbone, tmp_path, guide)
    assert case.draw([Attempt("a photo of the cat"), Attempt("a dog", seed=5)], step=3) == [True, True]
    assert case.best is not None and case.best.step == 3 and case.tried == [(3, True), (3, True)]
    assert torch.equal(case.best.pixels, backbone.generate(["a photo of the cat", "a dog"], [0, 5], guide=guide)[0])
    assert not torch.equal(case.best.pixels, backbone.generate(["a photo of the cat", "a dog"], [0, 5])[0])


def test_the_first_success_is_kept_and_else_the_last_attempt(new_backbone: Any, tmp_path: Path) -> None:
    judge = Eye("dog")
    case = case_of(new_backbone(), tmp_path, judge=judge)
    assert case.draw([Attempt("one"), Attempt("two")]) == [False, False]
    assert case.best is not None and case.best.attempt.text == "two"
    judge.label = "Cat"
    assert case.draw([Attempt("three"), Attempt("four")], step=1) == [True, True]
    assert case.best.attempt.text == "three"
    judge.label = "dog"
    case.draw([Attempt("five")], step=2)
    assert case.best.attempt.text == "three" and case.tried == [(0, False)] * 2 + [(1, True)] * 2 + [(2, False)]
    assert not any(file.exists() for file in judge.seen), "what was only judged is not kept"


def test_vectors_and_states_reach_the_model(new_backbone: Any, tmp_path: Path) -> None:
    backbone = new_backbone()
    case = case_of(backbone, tmp_path)
    named = NamedPrompt.of("a photo of the {}", "cat")
    dog = Attempt(named, vectors=backbone.token_vectors("dog"))
    states = Attempt("", states=backbone.encode(["a photo of the dog"]))
    images = []
    for attempt in (dog, states, Attempt("a photo of the dog")):
        case.best = None
        case.draw([attempt])
        images.append(case.best.pixels)  # type: ignore[attr-defined]
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[2])
    assert (typed(dog), typed(states), typed(Attempt("x"))) == ("a photo of the ", "", "x")


def test_spm_weighs_its_adapters_by_what_was_given(new_backbone: Any) -> None:
    """By the states and the typed words, not by the prompt that they stand for."""
    backbone = new_backbone()
    guide = FacilitatedTransport("cat")
    noise = backbone.encode(["a big ship"])
    seen: list[Any] = []
    backbone.adapter_scale = lambda scale: seen.append(scale) or torch.no_grad()
    for call in (
        lambda: guide.around_states(backbone, noise, [""]),
        lambda: guide.around_states(backbone, backbone.encode(["a cat"]), ["a cat"]),
        lambda: guide.around(backbone, ["a cat"]),
    ):
        with call():
            pass
    assert torch.equal(seen[0], permeability(backbone, [""], ["cat"], noise)) and seen[0] < 1
    assert torch.equal(seen[1], seen[2]) and seen[2] == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_any_method_is_attacked(method: str, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))

    def run(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *words])
        import_module(f"realera.{name}").main()

    few = {"sld": [], "mace": ["method.align.steps=1"]}.get(method, ["method.align.steps=1"])
    images = ["method.latents.images=2"] if method in ("sa", "mace") else []
    fisher = ["method.align.fisher.samples=1", "method.align.fisher.timesteps=1"] if method == "sa" else []
    run("train", "concept=airplane", f"method={method}", "run_dir=run", *few, *images, *fisher, *small)
    for attack in ("closed-form", "inversion", "complete"):
        tiny = ["attack.steps=1", "attack.images=1", "attack.batch=1"] if attack == "inversion" else []
        run("attack", "run=run", f"attack={attack}", "limit=1", *tiny)
    numbers = attacked.numbers(tmp_path / "run")
    assert numbers.keys() == {"closed-form", "inversion", "complete"}
    assert len({str(one["protocol"]["source"]) for one in numbers.values()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tiny_sd21", "tiny_sdxl"])
def test_other_layouts(layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """v-prediction; two text encoders and pooled states."""
    from realera.attacks.closed_form import ClosedForm
    from realera.attacks.inversion import Inversion
    from realera.backbones.unet import UNetBackbone
    from realera.contracts import Sampler

    folder = request.getfixturevalue(layout)
    backbone = UNetBackbone("tiny", folder, Sampler("ddim", 2, 5.0, 64, 64))
    attacks: list[Any] = [ClosedForm(), Inversion(steps=1, batch=1, images=1)]
    with paths.cache_at(tmp_path):
        for attack in attacks:
            case = case_of(backbone, tmp_path)
            case.searched = attack.search(case)
            attack(case)
            assert case.best is not None and case.best.pixels.shape == (64, 64, 3)


@pytest.mark.slow
def test_the_controls_on_the_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unedited model draws the concept nearly always, and for random prompts nearly never; the closed form brings
    back a concept that UCE erased."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    words = ["concept=airplane", "backbone=mini", "task.images={erase:20,near:1,keep:1,associated:1,unseen:1}"]

    def run(name: str, *more: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *more])
        import_module(f"realera.{name}").main()

    run("train", *words, "method=uce", "run_dir=uce", "logger=none")
    for attack, folder in (("random", "original"), ("random", "uce"), ("closed-form", "uce")):
        run(
            "attack",
            f"attack={attack}",
            *(["run=uce"] if folder == "uce" else ["run=original", "run_dir=original", *words]),
        )
    control, erased = attacked.numbers(tmp_path / "original"), attacked.numbers(tmp_path / "uce")
    assert control["random"]["original"]["value"] >= 90 and control["random"]["asr"]["value"] <= 10
    assert erased["random"]["asr"]["value"] <= 10 and erased["random"]["pre_asr"]["value"] <= 10
    assert erased["closed-form"]["asr"]["value"] >= 90 and control["random"]["asr"]["high"] < 35
