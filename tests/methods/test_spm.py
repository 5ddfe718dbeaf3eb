"""SPM against slow, obvious loops: its loss, its rate, and the effect of its membranes on a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from options import built
from realera.contracts import LoraSpec, Pair, TrainingBatch, UserError
from realera.evaluation.generate import source_of
from realera.methods.spm import FacilitatedTransport, SemiPermeableMembrane, permeability
from realera.training.checkpoint import load_erased

TARGETS = ("attn1.to_q", "attn2.to_v", "ff.net.2", "proj_in")
SPEC = LoraSpec(rank=1, alpha=1.0, targets=TARGETS, init="kaiming", per_concept=True)
WORDS = ["sky", "dog", "a red car", "cat", "mona lisa"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def trained(new_backbone: Callable[..., Any]) -> Callable[[int], Any]:
    """trained(2): a backbone with the membranes of two concepts, which are not zero."""

    def make(concepts: int) -> Any:
        backbone = new_backbone()
        for parameter in backbone.add_adapter(SPEC, seeded(1), concepts):
            nn.init.normal_(parameter, std=0.3, generator=seeded(parameter.numel()))
        return backbone

    return make


def aligner(backbone: Any, pairs: list[Pair], **settings: Any) -> SemiPermeableMembrane:
    made = SemiPermeableMembrane(SPEC, **{"words": WORDS, "anchor_weight": 7.0, "anchors": 3, **settings})
    made.prepare(backbone, pairs, Path(), 0)
    return made


def gradients(backbone: Any, loss: Tensor) -> Tensor:
    found = [parameter for parameter in backbone.unet.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, found)]).double()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("anchoring", ["words", "noise"])
@pytest.mark.parametrize(("neutral", "eta"), [("", 1.0), (None, 0.5)])
def test_the_loss_is_the_papers(
    anchoring: str,
    neutral: str | None,
    eta: float,
    trained: Callable[[int], Any],
    new_backbone: Callable[..., Any],
    new_pairs: Callable[..., list[Pair]],
) -> None:
    """One latent, one anchor and one forward at a time, with a second U-Net as the teacher."""
    student, teacher = trained(1), new_backbone()
    pairs = new_pairs(student, ("cat", "field"))
    align = aligner(student, pairs, anchoring=anchoring, neutral=neutral, negative_guidance=eta)
    z_t, t = torch.randn(2, 4, 8, 8, generator=seeded(4)), torch.tensor([250, 900])
    terms = align.loss(student, pairs[0], None, TrainingBatch(z_t, t, 1), seeded(5))
    loss = terms["erase"] + terms["anchor"]
    assert float(terms["anchor"].detach()) == pytest.approx(7 * float(terms["anchor_unweighted"]))
    assert not terms["anchor_unweighted"].requires_grad

    c = teacher.encode(["cat"]).states[0]
    n = teacher.encode(["field" if neutral is None else neutral]).states[0]
    if anchoring == "words":
        chances = []
        for word in WORDS:
            k = teacher.encode([word]).states[0]
            cosine = float((k * c).sum() / (k.norm() * c.norm()))
            chances.append(0.0 if word == "cat" else 1 - cosine)
        picked = torch.multinomial(torch.tensor(chances), 3, generator=seeded(5)).tolist()
        anchors = [teacher.encode([WORDS[i]]).states[0] for i in picked]
    else:
        generator = seeded(5)
        noise = torch.randn(3, *c.shape, generator=generator)
        lengths = 0.8 + 0.4 * torch.rand(3, 1, 1, generator=generator)
        noisy = [length * x / x.norm() * c.norm() for x, length in zip(noise, lengths)]
        assert all(0.8 <= float(k.norm() / c.norm()) <= 1.2 for k in noisy)
        empty = teacher.encode([""]).states[0]
        anchors = [row for k in noisy for row in (empty, k)][3:]

    def noise_of(backbone: Any, b: int, states: Tensor) -> Tensor:
        with torch.set_grad_enabled(backbone is student):
            out: Tensor = backbone.predict_noise(z_t[b : b + 1], t[b : b + 1], states[None])
        return out

    erase, kept = torch.zeros(()), torch.zeros(())
    for b in range(2):
        e_n, e_c = noise_of(teacher, b, n), noise_of(teacher, b, c)
        erase = erase + ((noise_of(student, b, c) - (e_n - eta * (e_c - e_n))) ** 2).mean() / 2
        for k in anchors:
            kept = kept + ((noise_of(student, b, k) - noise_of(teacher, b, k)) ** 2).mean() / 6
    slow = erase + 7 * kept
    torch.testing.assert_close(loss, slow, rtol=1e-5, atol=1e-6)
    fast, plain = gradients(student, loss), gradients(student, slow)
    assert (fast - plain).norm() < 1e-5 * plain.norm()


def test_of_four_anchors_of_noise_two_are_empty(trained: Callable[[int], Any], new_pairs: Any) -> None:
    """As in the official code: an empty prompt before each, and then the second half of the eight."""
    backbone = trained(1)
    found = aligner(backbone, new_pairs(backbone, ("cat", "field")), anchoring="noise", anchors=4)._anchors(
        "cat", seeded(5)
    )
    empty = backbone.encode([""]).states[0]
    assert [torch.allclose(states, empty, atol=1e-6) for states in found.states] == [True, False, True, False]
    noise = torch.randn(4, *empty.shape, generator=seeded(5))
    for states, drawn in ((found.states[1], noise[2]), (found.states[3], noise[3])):
        assert float(torch.cosine_similarity(states.flatten(), drawn.flatten(), dim=0)) == pytest.approx(1, abs=1e-5)


def test_far_words_are_drawn_more_often(new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, ("cat", "field"))
    flat, steep = (aligner(backbone, pairs, anchor_power=power).far["cat"] for power in (1.0, 3.0))
    assert flat[3] == steep[3] == 0  # the concept itself
    near, far = int(flat[:3].argmin()), int(flat[:3].argmax())
    assert flat[near] < flat[far]
    torch.testing.assert_close(steep, flat**3)


def test_without_latent_anchoring(trained: Any, new_pairs: Any) -> None:
    student = trained(1)
    pairs = new_pairs(student, ("cat", "field"))
    z_t, t = torch.randn(2, 4, 8, 8, generator=seeded(4)), torch.tensor([250, 900])
    terms = aligner(student, pairs, anchor_weight=0, words=()).loss(
        student, pairs[0], None, TrainingBatch(z_t, t, 1), seeded(5)
    )
    assert set(terms) == {"erase"}


def test_the_rate_equals_the_official_scheduler() -> None:
    from transformers import get_cosine_with_hard_restarts_schedule_with_warmup as official

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = official(optimizer, num_warmup_steps=5, num_training_steps=40, num_cycles=3)
    align = SemiPermeableMembrane(SPEC, steps=40, warmup=5, cycles=3)
    for step in range(1, 41):
        assert align.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    constant = SemiPermeableMembrane(SPEC, steps=40, warmup=2, cycles=0)
    assert [constant.rate(step) for step in (1, 2, 3, 40)] == [0, 0.5, 1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"anchoring": "images"},
        {"steps": -1},
        {"lr": 0.0},
        {"warmup": -1},
        {"anchors": 0},
        {"anchor_weight": float("nan")},
        {"negative_guidance": float("inf")},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(SemiPermeableMembrane, lora=SPEC, **settings)


def test_too_few_words_are_refused(new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    with pytest.raises(UserError, match="too few words besides 'cat'"):
        aligner(backbone, new_pairs(backbone, ("cat", "field")), words=["sky", "Cat", "dog"])


# --- transport -------------------------------------------------------------------------------------------------------


def test_permeability(new_backbone: Any) -> None:
    """The larger of the cosine of all rows as one vector, and the share of the concept's sub-tokens."""
    backbone = new_backbone()
    texts, concepts = ["a photo of the cat", "mona", "the sky"], ["cat", "mona lisa"]
    found = permeability(backbone, texts, concepts)
    pieces = {text: set(backbone.text.tokenizer.tokenize(text)) for text in [*texts, *concepts]}
    assert len(pieces["mona lisa"]) > len(pieces["mona"]) > 0
    for b, text in enumerate(texts):
        for i, concept in enumerate(concepts):
            p, c = (backbone.encode([x]).states[0].flatten().double() for x in (text, concept))
            cosine = float((p @ c) / (p.norm() * c.norm()))
            overlap = len(pieces[text] & pieces[concept]) / len(pieces[concept])
            assert float(found[b, i]) == pytest.approx(max(cosine, overlap, 0), abs=1e-5)
    assert float(found[0, 0]) == 1  # the prompt contains the whole name


def merged(backbone: Any, new_backbone: Callable[..., Any], m: list[float], transport: str) -> Any:
    """A backbone with the two membranes, scaled as each transport does, added to the original weights."""
    state, plain = backbone.erased_state(), new_backbone()
    weights = dict(plain.unet.named_parameters())
    edited = {}
    for name in {key.removeprefix("lora.").rpartition(".")[0] for key in state}:
        down, up = (state[f"lora.{name}.{part}"].flatten(1) for part in ("down", "up"))
        if transport == "official":
            delta = sum(m[i] * up[:, i : i + 1] for i in range(2)) @ sum(m[i] * down[i : i + 1] for i in range(2))
        else:
            delta = sum(m[i] * up[:, i : i + 1] @ down[i : i + 1] for i in range(2))
        weight = weights[f"{name}.weight"].detach()
        edited[f"edit.{name}.weight"] = weight + delta.view(weight.shape)
    plain.load_erased(edited)
    return plain


@pytest.mark.parametrize("transport", ["per_module", "official", "none"])
def test_a_membrane_is_scaled_by_the_prompts_similarity_to_its_concept(
    transport: Any, trained: Callable[[int], Any], new_backbone: Callable[..., Any]
) -> None:
    backbone, texts = trained(2), ["a photo of the cat", "the mona"]
    guide = FacilitatedTransport(["cat", "mona lisa"], transport)
    m = permeability(backbone, texts, guide.concepts) if transport != "none" else torch.ones(2, 2)
    z, t = torch.randn(1, 4, 8, 8, generator=seeded(3)), torch.tensor([500])
    read = backbone.encode(texts).states
    with torch.no_grad():
        with guide.around(backbone, texts):
            both = backbone.predict_noise(z.expand(4, -1, -1, -1), t.expand(4), read.repeat(2, 1, 1))  # under guidance
        for b in range(2):
            alone = merged(backbone, new_backbone, m[b].tolist(), transport)
            wanted = alone.predict_noise(z, t, read[b : b + 1])[0]
            torch.testing.assert_close(both[b], wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(both[b + 2], wanted, atol=1e-4, rtol=1e-4)


def test_the_official_transport_of_one_concept_is_squared(trained: Callable[[int], Any]) -> None:
    backbone, texts = trained(1), ["the sky"]
    z, t, read = torch.randn(1, 4, 8, 8, generator=seeded(3)), torch.tensor([500]), backbone.encode(texts).states
    m = permeability(backbone, texts, ["cat"])
    assert 0 < float(m) < 1
    with torch.no_grad():
        with FacilitatedTransport("cat", "official").around(backbone, texts):
            official = backbone.predict_noise(z, t, read)
        with backbone.adapter_scale(m**2):
            torch.testing.assert_close(official, backbone.predict_noise(z, t, read))


@pytest.mark.slow
def test_a_loaded_run_is_drawn_through_its_guide(
    new_backbone: Any, new_pairs: Any, load_method: Any, tmp_path: Path
) -> None:
    """As in `evaluate`, `generate` and `demo`: the same images as directly after the fit; without the guide, others."""
    from realera.training.fit import fit

    method, backbone = load_method("spm", "align.warmup=0", "align.lr=0.1"), new_backbone()
    pairs = new_pairs(backbone, ("cat", "field"))
    fit(backbone, method, pairs, run_dir=tmp_path, seed=0, config={}, trainer={"accelerator": "cpu"}, cache=tmp_path)
    texts = ["a photo of the cat", "the sky"]
    drawn = backbone.generate(texts, [1, 2], guide=method.guide)
    with backbone.original():
        original = backbone.generate(texts, [1, 2])
    loaded = new_backbone()
    load_erased(tmp_path / "erased.safetensors", loaded)
    assert torch.equal(loaded.generate(texts, [1, 2], guide=load_method("spm").guide), drawn)
    plain = loaded.generate(texts, [1, 2])
    assert not torch.equal(drawn[0], original[0]) and not torch.equal(drawn[1], plain[1])
    guides = (None, method.guide, FacilitatedTransport("dog"), FacilitatedTransport("cat", "none"))
    assert len({source_of(loaded, guide=guide) for guide in guides}) == 4


@pytest.mark.parametrize(
    ("settings", "said"), [({"concepts": "cat", "transport": "all"}, "transport"), ({}, "name one")]
)
def test_bad_guides_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        built(FacilitatedTransport, **settings)
