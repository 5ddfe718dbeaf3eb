"""The LightningModule of the training loop: random numbers, trained parameters, logging."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from realera.contracts import LoraSpec, Method, Pair, UserError
from realera.training.fit import fit
from realera.training.module import ErasureModule
from realera.training.schedule import concept_of_step, part_of, step_of_concept, steps_per_concept
from realera.training.seeding import stream


class Watched:
    """An aligner whose loss is one number of the adapter, and which records its arguments."""

    steps, lr, weight_decay = 6, 1e-3, 0.0
    lora: LoraSpec | None = LoraSpec()
    parameters: Sequence[str] = ()
    seen: list[tuple[str, int, float, float]]

    def __init__(self, factor: float = 1.0) -> None:
        self.seen = []
        self.factor = factor

    def loss(self, backbone: Any, pair: Pair, mine: Any, batch: Any, generator: Any) -> Any:
        drawn = float(torch.rand((), generator=generator))
        self.seen.append((pair.concept.target, batch.step, float(batch.latents[0, 0, 0, 0]), drawn))
        up = next(p for name, p in backbone.unet.named_parameters() if "lora_B" in name)
        return {"one": self.factor * ((up - 1) ** 2).sum(), "two": up.sum(), "noted": up.sum().detach() + 7}


class Noise:
    """A latent source that returns noise."""

    def prepare(self, *_: Any) -> None: ...

    def __call__(self, backbone: Any, concept: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(1, 4, 8, 8, generator=generator), torch.zeros(1, dtype=torch.int64)


@pytest.fixture
def train(new_backbone: Callable[..., Any], new_pairs: Callable[..., list[Pair]], tmp_path: Path) -> Callable[..., Any]:
    def go(align: Any, *concepts: tuple[str, str], to: str = "run", **settings: Any) -> Any:
        backbone = new_backbone()
        fit(
            backbone,
            Method("watched", latents=Noise(), align=align),
            new_pairs(backbone, *(concepts or (("cat", "field"),))),
            run_dir=tmp_path / to,
            config={},
            trainer={"accelerator": "cpu"},
            **{"seed": 0, **settings},
        )
        return backbone

    return go


def test_streams_depend_on_seed_and_purpose() -> None:
    def first(*key: Any) -> float:
        return float(torch.rand((), generator=stream(*key)))

    assert first(0, "latents", 3, 0) == first(0, "latents", 3, 0)
    keys = [(0, "latents", 3, 0), (1, "latents", 3, 0), (0, "align", 3, 0), (0, "latents", 4, 0), (0, "latents", 3, 1)]
    assert len({first(*key) for key in keys}) == len(keys)


def test_the_mean_over_processes_is_the_mean_of_the_batch() -> None:
    values = torch.arange(24, dtype=torch.float64) ** 2
    for batch in range(1, 13):
        for world in range(1, 13):
            parts = [part_of(batch, rank, world) for rank in range(world)]
            means = torch.stack([values[:batch][part].mean() for part in parts])
            assert means.mean() == pytest.approx(float(values[:batch].mean())), (batch, world)
    assert [part_of(8, rank, 4) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert [part_of(1, rank, 3) for rank in range(3)] == [slice(0, 1)] * 3


def test_every_step_draws_new_numbers(train: Callable[..., Any]) -> None:
    one, two = Watched(), Watched()
    train(one, to="one")
    train(two, to="two", seed=1)
    assert [step for _, step, *_ in one.seen] == [1, 2, 3, 4, 5, 6]
    drawn = [value for _, _, latent, number in one.seen + two.seen for value in (latent, number)]
    assert len(set(drawn)) == len(drawn)


def test_each_concept_gets_an_odd_and_an_even_step(train: Callable[..., Any]) -> None:
    align = Watched()
    train(align, ("cat", "field"), ("ship", "sky"))
    assert [target for target, *_ in align.seen] == ["cat", "cat", "ship", "ship", "cat", "cat"]


def test_terms_with_a_gradient_are_summed_and_all_are_logged(train: Callable[..., Any], tmp_path: Path) -> None:
    train(Watched())
    lines = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(line["one"] + line["two"])
        assert line["noted"] == pytest.approx(line["two"] + 7)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_only_the_adapter_is_trained(new_backbone: Callable[..., Any], new_pairs: Callable[..., list[Pair]]) -> None:
    backbone = new_backbone()
    module = ErasureModule(backbone, Method("watched", align=Watched()), new_pairs(backbone, ("cat", "field")), 0)
    assert module.trained() == {}
    added = backbone.add_adapter(LoraSpec(), stream(0, "adapter"))
    found = module.trained()
    assert len(found) == len(added) == 2 * len(backbone.text_projections())
    assert all(".lora_" in name for name in found)


def test_steps_are_counted_for_each_concept() -> None:
    for concepts in (1, 2, 3):
        for steps in range(15):
            own = [concept_of_step(step, concepts) for step in range(1, steps + 1)]
            assert steps_per_concept(steps, concepts) == [own.count(concept) for concept in range(concepts)]


def test_a_loss_of_nan_stops_the_run(train: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at step 1: lower"):
        train(Watched(float("nan")))
    assert not (tmp_path / "run" / "erased.safetensors").exists()


def test_a_method_without_trainable_parameters_is_refused(train: Callable[..., Any]) -> None:
    align = Watched()
    align.lora = None
    with pytest.raises(UserError, match="no parameters to train"):
        train(align)


def test_pairs_are_moved_to_the_cpu_unchanged(
    new_backbone: Callable[..., Any], new_pairs: Callable[..., list[Pair]]
) -> None:
    backbone = new_backbone()
    pair = new_pairs(backbone, ("cat", "field"))[0]
    pair = replace(pair, target=replace(pair.target, pooled=torch.ones(3, 5)))
    kept = ErasureModule(backbone, Method("original"), [pair], 0).pairs[0]
    assert torch.equal(kept.target.states, pair.target.states)
    assert kept.target.pooled is not None and kept.anchor.pooled is None


def test_the_aligner_s_learning_rate_schedule_is_used(train: Callable[..., Any]) -> None:
    """Adam's first steps change a weight by lr, for any gradient; `rate` scales this change."""

    class Paced(Watched):
        lora = LoraSpec(init="gaussian")

        def rate(self, step: int) -> float:
            return {2: 1.0, 3: 0.5}.get(step, 0.0)

    align = Paced()
    backbone = train(align)
    up = next(p for name, p in backbone.unet.named_parameters() if "lora_B" in name)
    assert float(up.detach().abs().max()) == pytest.approx(1.5 * align.lr, rel=1e-2)


def test_concepts_count_their_own_steps() -> None:
    assert [concept_of_step(step, 3) for step in range(1, 9)] == [0, 0, 1, 1, 2, 2, 0, 0]
    assert [step_of_concept(step, 3) for step in range(1, 9)] == [1, 2, 1, 2, 1, 2, 3, 4]
    assert [step_of_concept(step, 1) for step in range(1, 6)] == [1, 2, 3, 4, 5]
