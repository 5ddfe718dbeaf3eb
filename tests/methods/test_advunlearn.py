"""AdvUnlearn against a slow, obvious loop: one latent at a time, Adam by hand, vectors as rows of the embedding
table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from options import built
from realera.contracts import Pair, TrainingBatch, UserError
from realera.methods.advunlearn import AdversarialUnlearning, ForgetAndRetain

NAME = "mona lisa"
RETAIN = ["a photo of a ship", "a big dog in the field", "a red car"]
TABLE = "embeddings.token_embedding.weight"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def student(new_backbone: Callable[..., Any]) -> Any:
    """A backbone whose text encoder differs from the original's and is trained."""
    backbone = new_backbone()
    backbone.choose("text_encoder")
    with torch.no_grad():
        for weight in backbone.unfreeze(["encoder", "final_layer_norm"]):
            weight.add_(0.02 * torch.randn(weight.shape, generator=seeded(weight.numel())))
    return backbone


@pytest.fixture
def pair(new_backbone: Callable[..., Any], new_pairs: Callable[..., list[Pair]]) -> Pair:
    return new_pairs(new_backbone(), (NAME, "person"))[0]


def read(backbone: Any, vectors: Tensor, before: bool) -> Tensor:
    """The states of the name with `vectors` (k, D) before or behind it: they become new rows of the token table."""
    tokenizer, model = backbone.text.tokenizer, backbone.text.model
    table = model.get_input_embeddings().weight
    own = tokenizer(NAME, add_special_tokens=False)["input_ids"]
    new = [len(table) + i for i in range(len(vectors))]
    ids = [tokenizer.bos_token_id, *(new + own if before else own + new), tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (backbone.max_length - len(ids))
    prefix = "" if TABLE in dict(model.named_parameters()) else "text_model."
    out = functional_call(
        model, {prefix + TABLE: torch.cat([table, vectors])}, kwargs={"input_ids": torch.tensor([ids])}
    )
    found: Tensor = out.last_hidden_state
    return found


def given(student: Any) -> tuple[TrainingBatch, dict[str, Tensor]]:
    """Two z_t, with two retained ones and three attack steps of two vectors each."""
    shape = (4, 8, 8)
    known = {
        "retain_latents": torch.randn(2, 2, *shape, generator=seeded(1)),
        "retain_timesteps": torch.tensor([[3, 900], [500, 30]]),
        "retain_prompts": torch.tensor([[0, 2], [1, 0]]),
        "attack_latents": torch.randn(2, 3, *shape, generator=seeded(2)),
        "attack_timesteps": torch.tensor([[10, 400, 800], [999, 5, 70]]),
        "attack_start": student.token_vectors("dog cat").repeat(2, 1, 1)
        + 0.1 * torch.randn(2, 2, 32, generator=seeded(3)),
    }
    z_t, t = torch.randn(2, *shape, generator=seeded(4)), torch.tensor([250, 600])
    return TrainingBatch(z_t, t, 300, known), known


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("place", "attack", "accumulate", "eta"),
    [("prefix", "pgd", True, 1.0), ("suffix", "pgd", False, 2.5), ("prefix", "fast", True, 0.0)],
)
def test_the_loss_and_its_gradient(
    place: str, attack: str, accumulate: bool, eta: float, student: Any, new_backbone: Callable[..., Any], pair: Pair
) -> None:
    teacher, (batch, known) = new_backbone(), given(student)
    align = built(
        AdversarialUnlearning, retain=RETAIN, place=place, attack=attack, accumulate=accumulate,
        negative_guidance=eta, retain_weight=0.3, attack_lr=0.05,
    )  # fmt: skip
    align.prepare(student, [pair], Path(), 0)
    terms = align.loss(student, pair, None, batch, seeded())
    assert set(terms) == {"erase", "attack", "retain"} and not terms["attack"].requires_grad

    def made(backbone: Any, z: Tensor, t: Tensor, states: Tensor) -> Tensor:
        found: Tensor = backbone.predict_noise(z[None], t[None], states)
        return found

    name, empty = teacher.encode([NAME]).states, teacher.encode([""]).states
    erase = retain = left = torch.zeros(())
    for b in range(2):
        vectors, total = known["attack_start"][b].clone(), torch.zeros(2, 32)
        mean = square = torch.zeros(2, 32)
        for s in range(3):
            z, t = known["attack_latents"][b, s], known["attack_timesteps"][b, s]
            leaf = vectors.clone().requires_grad_(True)
            loss = (
                (made(student, z, t, read(student, leaf, place == "prefix")) - made(teacher, z, t, name)) ** 2
            ).mean()
            total = torch.autograd.grad(loss, [leaf])[0] + (total if accumulate else 0)
            total = total.sign() if attack == "fast" else total
            mean, square = 0.9 * mean + 0.1 * total, 0.999 * square + 0.001 * total**2
            scaled = (mean / (1 - 0.9 ** (s + 1))) / ((square / (1 - 0.999 ** (s + 1))).sqrt() + 1e-8)
            vectors = vectors - 0.05 * scaled
        left = left + loss.detach() / 2
        z, t = batch.latents[b], batch.timesteps[b]
        goal = (1 + eta) * made(teacher, z, t, empty) - eta * made(teacher, z, t, name)
        erase = erase + ((made(student, z, t, read(student, vectors, place == "prefix")) - goal) ** 2).mean() / 2
        for r in range(2):
            z, t = known["retain_latents"][b, r], known["retain_timesteps"][b, r]
            text = [RETAIN[int(known["retain_prompts"][b, r])]]
            kept = made(teacher, z, t, teacher.encode(text).states)
            retain = retain + ((made(student, z, t, student.encode(text).states) - kept) ** 2).mean() / 4
    assert torch.allclose(terms["erase"], erase, rtol=1e-3)
    assert torch.allclose(terms["retain"], 0.3 * retain, rtol=1e-4)
    assert torch.allclose(terms["attack"], left, rtol=1e-3)
    weights = [weight for weight in student.trained.parameters() if weight.requires_grad]
    fast, slow = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        for loss in (terms["erase"] + terms["retain"], erase + 0.3 * retain)
    )
    assert torch.allclose(fast, slow, rtol=1e-2, atol=1e-4 * float(slow.abs().max()))
    assert not any(weight.requires_grad for weight in student.unet.parameters())


def test_without_an_attack_the_name_itself_is_erased(
    student: Any, new_backbone: Callable[..., Any], pair: Pair
) -> None:
    teacher, (batch, _) = new_backbone(), given(student)
    align = built(AdversarialUnlearning, retain=RETAIN)
    align.prepare(student, [pair], Path(), 0)
    terms = align.loss(student, pair, None, TrainingBatch(batch.latents, batch.timesteps, 1), seeded())
    z, t = batch.latents, batch.timesteps
    two = [teacher.predict_noise(z, t, teacher.encode([text] * 2).states) for text in (NAME, "")]
    made = student.predict_noise(z, t, student.encode([NAME] * 2).states)
    assert set(terms) == {"erase"} and torch.allclose(
        terms["erase"], ((made - 2 * two[1] + two[0]) ** 2).mean(), rtol=1e-4
    )


@pytest.mark.parametrize("images", [None, 4])
@pytest.mark.slow
def test_the_latents(
    images: int | None, student: Any, new_backbone: Callable[..., Any], pair: Pair, tmp_path: Path
) -> None:
    """They come from the original model, whatever the text encoder is by now; the attack begins after the warm-up."""
    settings: dict[str, Any] = {
        "retain": [*RETAIN, "a mona lisa"],
        "retained": 2,
        "attacks": 3,
        "warmup": 2,
        "tokens": 2,
        "steps": 3,
        "batch": 2,
        "images": images,
        "chunk": 3,
    }
    source, other = built(ForgetAndRetain, **settings), built(ForgetAndRetain, **settings)
    source.prepare(student, [pair], tmp_path, 0)
    other.prepare(new_backbone(), [pair], tmp_path / "other", 0)
    assert source.prompts == RETAIN
    for step in range(4):
        found, same = source(student, 0, seeded(step)), other(new_backbone(), 0, seeded(step))
        assert torch.equal(found[0], same[0]) and torch.equal(found[1], same[1])
        known = found[2]
        assert known.keys() == same[2].keys() and all(torch.equal(known[key], same[2][key]) for key in known)
        assert found[0].shape == (2, 4, 8, 8) and known["retain_latents"].shape == (2, 2, 4, 8, 8)
        assert int(known["retain_prompts"].max()) < 3
        assert ("attack_latents" in known) == (step >= 2)
    assert known["attack_latents"].shape == (2, 3, 4, 8, 8) and known["attack_start"].shape == (2, 2, 32)
    assert not torch.equal(known["attack_latents"][0, 0], known["attack_latents"][0, 1])
    source.load_state_dict({}, [1])
    assert "attack_latents" not in source(student, 0, seeded())[2]
    assert "attack_latents" in source(student, 0, seeded())[2]


def test_what_a_plan_counts() -> None:
    node = {"retained": 5, "attacks": 30, "steps": 50, "batch": 1, "images": None}
    assert ForgetAndRetain.passes(node, 99) == 50 * 36 + 35 * 4 and ForgetAndRetain.makes(node, [], 99) == {}
    drawn = {**node, "images": 64, "batch": 2}
    assert ForgetAndRetain.passes(drawn, 99) == 2 * 35 * 4
    from realera.contracts import Concept

    assert ForgetAndRetain.makes(drawn, [Concept("cat", "dog")], 99) == {"stages cat": 6400.0, "stages ": 6400.0}
    assert AdversarialUnlearning.passes({}, 99) == 5


def test_prompts_that_all_name_the_concept(student: Any, pair: Pair, tmp_path: Path) -> None:
    source = built(ForgetAndRetain, retain=["the Mona Lisa"])
    with pytest.raises(UserError, match=r"Every prompt of method\.latents\.retain names mona lisa"):
        source.prepare(student, [pair], tmp_path, 0)
