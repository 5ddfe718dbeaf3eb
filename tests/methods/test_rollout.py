"""Partly drawn images: their stage, their timestep, and the model that drew them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from options import built
from realera.contracts import Edit, Pair, Sampler, UserError
from realera.methods.rollout import Rollout

STEPS = 4
SAMPLER = Sampler("ddim", STEPS, 3.0, 32, 32)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Noted:
    """A backbone that records its `sample` calls."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.asked: list[tuple[Any, list[int], Sampler, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def sample(self, states: Any, seeds: list[int], sampler: Sampler, guide: Any = None, stop_at: int = 0) -> Any:
        self.asked.append((states, seeds, sampler, stop_at))
        return self.backbone.sample(states, seeds, sampler, guide, stop_at)


@pytest.fixture
def backbone(new_backbone: Callable[..., Any]) -> Noted:
    return Noted(new_backbone())


@pytest.fixture
def pairs(backbone: Noted, new_pairs: Callable[..., list[Pair]]) -> list[Pair]:
    return new_pairs(backbone, ("cat", "field"), ("ship", "sky"))


def prepared(backbone: Any, pairs: list[Pair], **settings: Any) -> Rollout:
    source = Rollout(**{"steps": STEPS, **settings})
    source.prepare(backbone, pairs, Path(), 0)
    return source


def stage(backbone: Noted, chain: int, stop: int) -> Tensor:
    """The image of the last draw before step `stop`, drawn alone."""
    states, seeds, sampler, _ = backbone.asked[-1]
    alone = replace(states, **{key: getattr(states, key)[chain : chain + 1] for key in ("states", "first", "last")})
    made: Tensor = backbone.backbone.sample(alone, seeds[chain : chain + 1], sampler, stop_at=stop)
    return made[0]


@pytest.mark.quick(1)
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("batch", [1, 5])
def test_each_latent_is_an_image_stopped_where_its_timestep_says(
    batch: int, extra: int, backbone: Noted, pairs: list[Pair]
) -> None:
    """With four steps, the parts of 0 ... 999 are 250 wide. ESD's code goes two steps beyond, at most to the end."""
    source = prepared(backbone, pairs, batch=batch, extra_steps=extra)
    stops = set()
    for seed in range(8 if batch == 1 else 2):
        z_t, t = source(backbone, 1, seeded(seed))
        assert len(z_t) == len(t) == batch
        assert backbone.asked[-1][2] == SAMPLER
        for b in range(batch):
            stop = STEPS - 1 - int(t[b]) // 250
            stops.add(stop)
            assert torch.allclose(z_t[b], stage(backbone, b, min(stop + extra, STEPS)), atol=1e-5)
    assert len(stops) >= 3
    assert torch.equal(backbone.asked[-1][0].states[0], backbone.encode(["ship"]).states[0])


def test_sampling_stops_at_the_last_needed_step(backbone: Noted, pairs: list[Pair]) -> None:
    source = prepared(backbone, pairs)
    before = backbone.passes
    _, t = source(backbone, 0, seeded(3))
    assert backbone.passes - before == 2 * (STEPS - 1 - int(t) // 250)


def test_the_bin_law_is_uniform(backbone: Noted, pairs: list[Pair]) -> None:
    t = prepared(backbone, pairs, steps=3, batch=3000, renew=2, chains=1)(backbone, 0, seeded())[1]
    assert int(t.min()) < 5 and int(t.max()) in range(995, 1000)
    assert abs(float(t.float().mean()) - 499.5) < 25 and abs(float(t.float().std()) - 288.7) < 12


def test_other_laws_of_the_timestep(backbone: Noted, pairs: list[Pair]) -> None:
    """ "level": the sampler's timestep; "list": entry 1000 k / steps of 999, 998, ... 0."""
    settings = {"batch": 40, "renew": 2, "chains": 1, "first_stop": 1}
    level = prepared(backbone, pairs, timestep="level", **settings)(backbone, 0, seeded())[1]
    assert set(level.tolist()) == set(backbone.timesteps(SAMPLER).tolist()[1:])
    listed = prepared(backbone, pairs, timestep="list", **settings)(backbone, 0, seeded())[1]
    assert set(listed.tolist()) == {999 - 250, 999 - 500, 999 - 750}


@pytest.mark.parametrize(
    ("text", "words"),
    [("concept", ["cat"]), ("anchor", ["field"]), ("concept_prompts", ["a photo of the cat", "a cat"])],
)
def test_the_drawn_prompt(text: str, words: list[str], backbone: Noted, pairs: list[Pair]) -> None:
    prepared(backbone, pairs, text=text, batch=30)(backbone, 0, seeded())
    drawn = backbone.asked[-1][0].states
    for state in backbone.encode(words).states:
        assert any(torch.allclose(state, one) for one in drawn)


@pytest.mark.parametrize("model", ["trained", "original"])
def test_the_model_that_draws(model: str, backbone: Noted, pairs: list[Pair]) -> None:
    source = prepared(backbone, pairs, model=model, first_stop=STEPS - 1)
    before = source(backbone, 0, seeded())[0]
    backbone.apply(Edit(map=2 * torch.eye(32, dtype=torch.float64)))
    assert torch.equal(before, source(backbone, 0, seeded())[0]) == (model == "original")


def test_stages_are_used_for_several_steps_of_their_concept(backbone: Noted, pairs: list[Pair]) -> None:
    source = prepared(backbone, pairs, batch=6, renew=2, chains=2)
    for seed, (concept, draws) in enumerate([(0, 1), (1, 2), (0, 2), (0, 3), (1, 3), (1, 4)]):
        z_t, t = source(backbone, concept, seeded(seed))
        assert len(backbone.asked) == draws
        if (seed, concept) in ((0, 0), (3, 0), (5, 1)):  # just drawn
            for b in range(6):
                stop = STEPS - 1 - int(t[b]) // 250
                assert any(torch.allclose(z_t[b], stage(backbone, chain, stop), atol=1e-5) for chain in range(2))


def test_a_resumed_run_has_its_stages(backbone: Noted, pairs: list[Pair]) -> None:
    """If they were drawn again, they would be of the later model."""
    source = prepared(backbone, pairs, batch=2, renew=3, chains=2)
    source(backbone, 0, seeded(1))
    saved = source.state_dict()
    resumed = prepared(backbone, pairs, batch=2, renew=3, chains=2)
    resumed.load_state_dict(saved, [1, 0])
    backbone.apply(Edit(map=2 * torch.eye(32, dtype=torch.float64)))
    for seed in (2, 3, 4):
        assert torch.equal(source(backbone, 0, seeded(seed))[0], resumed(backbone, 0, seeded(seed))[0])
    assert len(backbone.asked) == 3


def test_two_models_with_one_source_share_no_stages(backbone: Noted, pairs: list[Pair]) -> None:
    source = prepared(backbone, pairs, renew=3, chains=2)
    source(backbone, 0, seeded())
    source.prepare(backbone, pairs[1:], Path(), 0)
    source(backbone, 0, seeded())
    assert len(backbone.asked) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "frozen"},
        {"text": "name"},
        {"timestep": "half"},
        {"batch": 0},
        {"renew": 0},
        {"extra_steps": -1},
        {"first_stop": 50},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))}="):
        built(Rollout, **settings)
