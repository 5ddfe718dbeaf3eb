"""SA against slow, obvious loops."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor

from options import built, method_settings
from realera.contracts import Edit, Pair, TrainingBatch, UserError
from realera.methods.replay import CAPTIONS, Fisher, Replay, _Parts
from realera.methods.sa import ForgetAndReplay, SelectiveAmnesia
from realera.settings.resolvers import register_resolvers
from realera.system.ranks import Ranks
from realera.tasks import objects
from tearing import TEARS, tear

SAID = ["a red car", "a photo of the cat", "an old ship", "the sky"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def backbone(new_backbone: Callable[..., Any]) -> Any:
    found = new_backbone()
    found.unfreeze(["attn2", "conv_out"])
    return found


@pytest.fixture
def pair(backbone: Any, new_pairs: Callable[..., list[Pair]]) -> Pair:
    return new_pairs(backbone, ("cat", "field"))[0]


def replay(images: int = 6) -> Replay:
    return Replay(captions=SAID, images=images, chunk=4)


def fisher(**settings: Any) -> Fisher:
    return Fisher(**{"replay": replay(), "samples": 3, "timesteps": 5, "at_once": 2, "chunk": 1, **settings})


def trained(backbone: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in backbone.unet.named_parameters() if weight.requires_grad}


# --- Fisher information ----------------------------------------------------------------------------------------------


def test_the_fisher_information(backbone: Any, tmp_path: Path) -> None:
    """One timestep at a time: squares of sums, a mean over images, scaled to 1000 timesteps."""
    found = fisher()(backbone, tmp_path, 0)
    again = replay()
    again.prepare(backbone, tmp_path, 0)
    slow = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in trained(backbone).items()}
    for image in range(3):
        generator = seeded(1_000_003 + image)
        sums = {name: torch.zeros_like(value) for name, value in slow.items()}
        states = backbone.encode([SAID[image]]).states
        noises = torch.cat([torch.randn(n, 4, 8, 8, generator=generator) for n in (2, 2, 1)])
        for noise, t in zip(noises, (100, 300, 500, 700, 900)):
            z_t = backbone.noisy_latents(again.bank[image][None], noise[None], torch.tensor([t]))
            loss = ((backbone.predict_noise(z_t, torch.tensor([t]), states)[0] - noise) ** 2).mean()
            for name, gradient in zip(slow, torch.autograd.grad(loss, list(trained(backbone).values()))):
                sums[name] += gradient.double() * 200
        for name in slow:
            slow[name] += sums[name] ** 2 / 3
    assert found.keys() == slow.keys() and len(found) > 10
    for name, value in found.items():
        assert (value - slow[name]).norm() < 1e-5 * slow[name].norm() + 1e-12, name


def test_the_fisher_information_works_with_every_seed(backbone: Any, tmp_path: Path) -> None:
    assert fisher(samples=1)(backbone, tmp_path, 2**63 - 1)


def test_every_timestep_is_taken_once() -> None:
    part = Fisher(replay(), samples=1, timesteps=1000)
    assert part.timesteps.tolist() == list(range(1000))


@pytest.mark.slow
def test_the_fisher_information_is_cached_by_its_inputs(backbone: Any, tmp_path: Path) -> None:
    first = fisher()(backbone, tmp_path, 0)
    passes = backbone.passes
    second = fisher()(backbone, tmp_path, 0)
    assert backbone.passes == passes and all(torch.equal(first[name], second[name]) for name in first)
    fisher(samples=2)(backbone, tmp_path, 0)
    fisher(timesteps=4)(backbone, tmp_path, 0)
    fisher()(backbone, tmp_path, 1)
    backbone.unfreeze(["attn1"])
    fisher()(backbone, tmp_path, 0)
    assert len(list((tmp_path / "fisher").iterdir())) == 5


def test_the_fisher_information_uses_the_initial_weights(backbone: Any, tmp_path: Path) -> None:
    first = fisher()(backbone, tmp_path / "one", 0)
    backbone.apply(Edit(map=2 * torch.eye(32, dtype=torch.float64)))
    second = fisher()(backbone, tmp_path / "two", 0)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_sum_is_continued(backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = fisher()(backbone, tmp_path / "straight", 0)
    real = Fisher.gradients
    seen: list[int] = []

    def counted(self: Fisher, backbone: Any, image: int, *rest: Any) -> list[Tensor]:
        if len(seen) == 2:
            seen.append(-1)
            raise KeyboardInterrupt
        seen.append(image)
        return real(self, backbone, image, *rest)

    monkeypatch.setattr(Fisher, "gradients", counted)
    with pytest.raises(KeyboardInterrupt):
        fisher()(backbone, tmp_path / "cut", 0)
    resumed = fisher()(backbone, tmp_path / "cut", 0)
    assert seen == [0, 1, -1, 2]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("part", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "part"])
@pytest.mark.slow
def test_a_torn_file_is_made_again(
    part: bool, backbone: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """part: a file of a run that was killed before its parts were merged."""
    straight = fisher()(backbone, tmp_path / "straight", 0)
    for how in TEARS:
        cache = tmp_path / how
        if part:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(_Parts, "merge", interrupt)
                fisher()(backbone, cache, 0)
        else:
            fisher()(backbone, cache, 0)
        (file,) = (cache / "fisher").iterdir()
        tear(file, how)
        caplog.clear()
        again = fisher()(backbone, cache, 0)
        assert all(torch.equal(straight[name], again[name]) for name in straight), how
        assert [record.getMessage() for record in caplog.records].count(f"{file} is torn: made again") == 1, how
        assert [found.suffixes for found in (cache / "fisher").iterdir()] == [[".safetensors"]]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_sum_is_continued_by_another_number_of_processes(backbone: Any, tmp_path: Path) -> None:
    """The second of two processes has finished when the first is killed; one process computes the rest."""
    straight = fisher(samples=5)(backbone, tmp_path / "one", 0)
    with pytest.raises(OSError, match="No such file"):  # the parts are not merged yet
        fisher(samples=5)(backbone, tmp_path / "two", 0, Ranks(1, 2))
    passes = backbone.passes
    both = fisher(samples=5)(backbone, tmp_path / "two", 0)
    assert backbone.passes - passes == 3 * 5  # images 0, 2, 4 at 5 timesteps each
    for name, value in straight.items():
        assert (value - both[name]).norm() < 1e-6 * value.norm(), name
    files = [next((tmp_path / folder / "fisher").iterdir()) for folder in ("one", "two")]
    assert files[0].name == files[1].name
    notes = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            notes.append(opened.metadata())
    assert notes[0]["passes"] == notes[1]["passes"] == "25"


# --- replay ----------------------------------------------------------------------------------------------------------


def test_captions_that_name_the_concept_are_not_replayed() -> None:
    part = Replay(captions=["a cat", "a catalog", "the CAT by the sea", "a dog"], images=7)
    assert part.without(["cat"]).tolist() == [1, 3, 5]
    assert part.without(["ship", "tom cruise"]).tolist() == list(range(7))
    with pytest.raises(UserError, match="names"):
        part.without(["cat", "dog", "catalog"])


def test_captions_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert Replay(captions=str(file)).captions == ["a cat", "a dog"]
    with pytest.raises(UserError, match="cannot be read"):
        Replay(captions=str(tmp_path / "none.txt"))
    own = Replay().captions
    assert own == CAPTIONS.read_text(encoding="utf-8").splitlines() and len(set(own)) == len(own) > 100
    classes = yaml.safe_load((Path(objects.__file__).parent / "data" / "objects.yaml").read_text(encoding="utf-8"))[
        "classes"
    ]
    judged = [word for name, said in classes.items() for word in (name, *said["synonyms"])]
    assert not [line for line in own for word in judged if re.search(rf"(?<!\w){word}s?(?!\w)", line, re.IGNORECASE)], (
        "no judged class is replayed"
    )


def test_a_pass_that_exceeds_gpu_memory_is_warned_of(
    new_backbone: Any, new_pairs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It depends on the number of pixels; with gradient checkpointing there is no warning."""
    for batch, checkpointing in ((8192, True), (2048, False), (8192, False)):
        assert not caplog.records
        backbone = new_backbone(gradient_checkpointing=checkpointing)
        both = ForgetAndReplay(replay(images=1), images=1, batch=batch)
        both.prepare(backbone, new_pairs(backbone, ("cat", "field")), tmp_path, 0)
    (record,) = caplog.records
    assert "16384 images of 32 x 32 pixels" in record.message and "gradient_checkpointing=true" in record.message


def test_a_pass_of_the_fisher_information_is_small_but_on_the_miniature() -> None:
    register_resolvers()
    for backbone, size in (("mini", 20), ("sd14", 4), ("sdxl", 1)):
        given = {"backbone": {"name": backbone}, "task": {"name": "object"}}
        config = OmegaConf.create({**given, "method": method_settings("sa")})
        assert config.method.align.fisher.at_once == size


def test_nudity_has_its_own_number_of_epochs() -> None:
    register_resolvers()
    for task, epochs, chosen in (("nsfw.NsfwTask", 500, 400), ("objects.ObjectTask", 200, 200)):
        for backbone in ("sd14", "mini"):
            given = {"backbone": {"name": backbone}, "task": {"_target_": f"realera.tasks.{task}"}}
            method = OmegaConf.create({**given, "method": method_settings("sa")}).method
            of_an_epoch = method.latents.images / method.latents.batch
            assert method.align.steps == (chosen if backbone == "mini" else epochs * of_an_epoch)


@pytest.mark.parametrize("zipped", [False, True])
def test_surrogate_and_replay(zipped: bool, backbone: Any, new_pairs: Any, tmp_path: Path) -> None:
    source = ForgetAndReplay(replay(), images=3, batch=40, chunk=3, zip_replay=zipped)
    (pair,) = new_pairs(backbone, ("cat", "field"))
    source.prepare(backbone, [pair], tmp_path, 0)
    z_t, t, known = source(backbone, 0, seeded(2))
    kept = [0, 2, 3, 4]  # image 1, and 5 which takes its caption again, are of a cat
    partners = set()
    states = backbone.encode(SAID).states
    for b in range(40):
        for image, z, at, noise in (
            (source.surrogate.banks[0], z_t, t, known["noise"]),
            (source.replay.bank, known["replay_latents"], known["replay_timesteps"], known["replay_noise"]),
        ):
            made = backbone.noisy_latents(image, noise[b].expand_as(image), at[b].expand(len(image)))
            near = (made - z[b]).flatten(1).abs().max(dim=1).values
            assert float(near.min()) < 1e-5
            if image is source.replay.bank:
                other = int(near.argmin())
            else:
                own = int(near.argmin())
        assert torch.equal(known["forget_states"][b], pair.target.states[own % len(pair.target.states)])
        assert torch.equal(known["replay_states"][b], states[other % 4])
        partners.add((own, other))
    if zipped:
        assert partners == {(i, kept[i]) for i in range(3)}
    else:
        assert {other for _, other in partners} == set(kept) and len(partners) > 8


def test_surrogate_and_forget_prompt_of_the_official_code(backbone: Any, pair: Pair, tmp_path: Path) -> None:
    """Images of "a middle aged man", learned for the bare name."""
    source = ForgetAndReplay(
        replay(), images=3, batch=8, chunk=3, surrogate=["a middle aged man"], forget=["{}", "a {}"]
    )
    source.prepare(backbone, [pair], tmp_path, 0)
    known = source(backbone, 0, seeded(2))[2]
    said = backbone.encode(["cat", "a cat"]).states
    assert {int((states == said).flatten(1).all(dim=1).int().argmax()) for states in known["forget_states"]} == {0, 1}
    man = Pair(pair.concept, pair.target, backbone.encode(["a middle aged man"]))
    plain = ForgetAndReplay(replay(), images=3, batch=8, chunk=3)
    plain.prepare(backbone, [man], tmp_path / "other", 0)
    assert torch.equal(plain.surrogate.banks[0], source.surrogate.banks[0])


# --- loss ------------------------------------------------------------------------------------------------------------


def test_equation_8(backbone: Any, new_backbone: Any, pair: Pair, tmp_path: Path) -> None:
    """One latent at a time, one weight at a time, with a second U-Net for the first weights."""
    source, align = (
        ForgetAndReplay(replay(), images=3, batch=4, chunk=3),
        SelectiveAmnesia(fisher(), gamma=0.5, lambda_ewc=7.0),
    )
    for part in (source, align):
        part.prepare(backbone, [pair], tmp_path, 0)
    with torch.no_grad():
        for i, weight in enumerate(trained(backbone).values()):
            weight += 1e-3 * torch.randn(weight.shape, generator=seeded(i))
    z_t, t, known = source(backbone, 0, seeded(9))
    terms = align.loss(backbone, pair, None, TrainingBatch(z_t, t, 1, known), seeded())

    information, first = fisher()(backbone, tmp_path, 0), dict(new_backbone().unet.named_parameters())
    forget = replayed = held = torch.zeros(())
    for b in range(4):
        states = known["forget_states"][b : b + 1]
        out = backbone.predict_noise(z_t[b : b + 1], t[b : b + 1], states)
        forget = forget + ((out[0] - known["noise"][b]) ** 2).mean() / 4
        z_r, t_r = known["replay_latents"][b : b + 1], known["replay_timesteps"][b : b + 1]
        out = backbone.predict_noise(z_r, t_r, known["replay_states"][b : b + 1])
        replayed = replayed + 0.5 * ((out[0] - known["replay_noise"][b]) ** 2).mean() / 4
    for name, weight in trained(backbone).items():
        held = held + 7.0 * (information[name] * (weight - first[name].detach()) ** 2).sum()
    slow = {"forget": forget, "replay": replayed, "ewc": held}
    assert terms.keys() == slow.keys() and float(held.detach()) > 0
    weights = list(trained(backbone).values())
    for name, term in slow.items():
        assert torch.allclose(terms[name], term, rtol=1e-5), name
        fast, plain = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)]).double()
            for loss in (terms[name], term)
        )
        assert (fast - plain).norm() < 1e-5 * plain.norm(), name


def test_initial_values_are_the_loaded_ones(backbone: Any, pair: Pair, tmp_path: Path) -> None:
    """In a resumed run, the weights have changed before `prepare` is called."""
    before = {name: weight.detach().clone() for name, weight in trained(backbone).items()}
    with torch.no_grad():
        for weight in trained(backbone).values():
            weight += 1
    align = SelectiveAmnesia(fisher())
    align.prepare(backbone, [pair], tmp_path, 0)
    assert align.first.keys() == before.keys()
    assert all(torch.equal(align.first[name], before[name]) for name in before)


def test_without_consolidation(backbone: Any, pair: Pair, tmp_path: Path) -> None:
    source, align = ForgetAndReplay(replay(), images=3, batch=2), SelectiveAmnesia(None)
    source.prepare(backbone, [pair], tmp_path, 0)
    align.prepare(backbone, [pair], tmp_path, 0)
    z_t, t, known = source(backbone, 0, seeded(9))
    assert set(align.loss(backbone, pair, None, TrainingBatch(z_t, t, 1, known), seeded())) == {"forget", "replay"}
    with pytest.raises(UserError, match="ForgetAndReplay"):
        align.loss(backbone, pair, None, TrainingBatch(z_t, t, 1, {"noise": known["noise"]}), seeded())


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (fisher, {"samples": 0}),
        (fisher, {"samples": 7}),
        (fisher, {"timesteps": 1001}),
        (SelectiveAmnesia, {"lambda_ewc": -1.0}),
        (SelectiveAmnesia, {"lr": 0.0}),
        (Replay, {"captions": []}),
    ],
)
def test_bad_settings_are_refused(part: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(Fisher if part is fisher else part, part, **settings)
