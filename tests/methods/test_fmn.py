"""FMN against slow, obvious loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from options import built
from realera.contracts import NamedPrompt, Pair, TrainingBatch, UserError
from realera.methods.fmn import AttentionResteering, Pooler, positions
from realera.methods.inversion import TextualInversion
from realera.methods.latents import AnchorBank


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def backbone(new_backbone: Callable[..., Any]) -> Any:
    return new_backbone()


@pytest.fixture
def pair(backbone: Any, new_pairs: Callable[..., list[Pair]]) -> Pair:
    return new_pairs(backbone, ("mona lisa", "person"))[0]


Z_T, T = torch.randn(3, 4, 8, 8, generator=seeded(4)), torch.tensor([3, 250, 999])
PROMPTS = torch.tensor([1, 0, 2])


def gradients(backbone: Any, loss: Tensor) -> Tensor:
    """Of all weights that have one, end to end."""
    found: Any = torch.autograd.grad(loss, list(backbone.unet.parameters()), allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None]).double()


def slow_probabilities(backbone: Any, b: int, states: Tensor) -> list[Tensor]:
    """softmax(Q K^T / sqrt(d)) of every cross-attention, from its projections' inputs; (heads, pixels, T)."""
    seen: dict[str, Tensor] = {}
    names = [str(name) for name, _ in backbone.unet.named_modules() if str(name).endswith("attn2")]
    hooks = []
    for name in names:
        for part in ("to_q", "to_k"):
            layer = backbone.unet.get_submodule(f"{name}.{part}")

            def keep(module: Any, inputs: Any, out: Tensor, key: str = f"{name}.{part}") -> None:
                seen[key] = out

            hooks.append(layer.register_forward_hook(keep))
    backbone.predict_noise(Z_T[b : b + 1], T[b : b + 1], states[None])
    for hook in hooks:
        hook.remove()
    found = []
    for name in names:
        heads = backbone.unet.get_submodule(name).heads
        q, k = (seen[f"{name}.{part}"][0].unflatten(-1, (heads, -1)).transpose(0, 1) for part in ("to_q", "to_k"))
        found.append(torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1))
    return found


@pytest.mark.parametrize("pooler", ["none", "eos", "pads"])
def test_the_norm_over_all_layers(pooler: Pooler, backbone: Any, pair: Pair) -> None:
    """One latent at a time, one number at a time over positions and layers."""
    backbone.unfreeze(["all"])
    terms = AttentionResteering(pooler=pooler).loss(
        backbone, pair, None, TrainingBatch(Z_T, T, 1, {"prompts": PROMPTS}), seeded()
    )
    slow = torch.zeros(())
    for b, p in enumerate(PROMPTS.tolist()):
        first, last, end = (int(rows[p]) for rows in (pair.target.first, pair.target.last, pair.target.length))
        rows = [*range(first, last + 1), *{"none": [], "eos": [end], "pads": range(end, 77)}[pooler]]
        squares = torch.zeros(())
        for probabilities in slow_probabilities(backbone, b, pair.target.states[p]):
            for row in rows:
                squares = squares + (probabilities[:, :, row] ** 2).sum()
        slow = slow + squares**0.5 / len(PROMPTS)
    loss = terms["attention"]
    assert set(terms) == {"attention"} and torch.allclose(loss, slow, rtol=1e-5)
    fast, plain = gradients(backbone, loss), gradients(backbone, slow)
    assert (fast - plain).norm() < 1e-5 * plain.norm()


def test_positions(pair: Pair) -> None:
    texts = pair.target
    own = positions(texts, "none")
    assert own.sum(dim=1).tolist() == (texts.last - texts.first + 1).tolist()
    assert all(own[p, int(texts.first[p])] and own[p, int(texts.last[p])] for p in range(3))
    assert ((positions(texts, "eos") & ~own).int().argmax(dim=1) == texts.length).all()
    assert positions(texts, "pads").sum(dim=1).tolist() == (own.sum(dim=1) + 77 - texts.length).tolist()


def test_training_lowers_the_attention(backbone: Any, pair: Pair) -> None:
    align = AttentionResteering()
    optimizer = torch.optim.AdamW(backbone.unfreeze(["attn2"]), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = align.loss(backbone, pair, None, TrainingBatch(Z_T, T, 1, {"prompts": PROMPTS}), seeded())["attention"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


# --- inversion -------------------------------------------------------------------------------------------------------


def inversion(**settings: Any) -> TextualInversion:
    bank = AnchorBank(images=3, batch=2, chunk=3, of="target", give=["noise", "prompts"])
    return TextualInversion(**{"images": bank, "steps": 3, "tokens": 3, **settings})


def test_a_step_of_inversion_by_hand(backbone: Any, pair: Pair, tmp_path: Path) -> None:
    """The noise loss of the vectors in the prompt, one latent at a time, and AdamW's first step written out."""
    part = inversion(steps=1, weight_decay=0.1, lr=0.01, pull=0.25)
    part.images.prepare(backbone, [pair], tmp_path, 0)
    made = part.invert(backbone, "mona lisa", 0, seeded(7))

    generator = seeded(7)
    own = backbone.token_vectors("mona lisa")
    assert len(own) > 3  # so that no vector starts at random
    torch.randn(3, 32, generator=generator)
    start = own[:3].clone().requires_grad_(True)
    z_t, t, known = part.images(backbone, 0, generator)  # type: ignore[misc]
    states = backbone.encode([NamedPrompt.of("a photo of {}", "mona lisa")], vectors=start).states
    losses = [
        ((backbone.predict_noise(z_t[b : b + 1], t[b : b + 1], states) - known["noise"][b]) ** 2).mean() for b in (0, 1)
    ]
    (slope,) = torch.autograd.grad(sum(losses) / 2, [start])
    stepped = start.detach() * (1 - 0.01 * 0.1) - 0.01 * slope / (slope.abs() + 1e-8)
    length, goal = stepped.norm(dim=-1, keepdim=True), own.norm(dim=-1).mean()
    torch.testing.assert_close(made, stepped / length * (0.75 * length + 0.25 * goal), rtol=1e-4, atol=1e-6)


def test_additional_vectors_start_at_random(backbone: Any, pair: Pair, tmp_path: Path) -> None:
    part = inversion(steps=0, tokens=4)
    part.images.banks = [torch.zeros(3, 4, 8, 8)]
    own = backbone.token_vectors("cat")
    made, other = (part.invert(backbone, "cat", 0, seeded(seed)) for seed in (0, 1))
    assert made.shape == (4, 32) and len(own) == 1
    assert torch.equal(made[:1], own) and torch.equal(other[:1], own)
    assert not torch.allclose(made[1:], other[1:])
    torch.testing.assert_close(made.norm(dim=-1), own.norm(dim=-1).expand(4))


def test_inversion_runs_once_and_replaces_the_name(backbone: Any, pair: Pair, tmp_path: Path) -> None:
    align = AttentionResteering(inversion=inversion())
    align.prepare(backbone, [pair], tmp_path, 0)
    found = align.found["mona lisa"]
    assert (int(found.first[0]), int(found.last[0]), int(found.length[0])) == (4, 6, 7)
    passes = backbone.passes
    again = AttentionResteering(inversion=inversion())
    again.prepare(backbone, [pair], tmp_path, 0)
    assert torch.equal(again.found["mona lisa"].states, found.states) and backbone.passes == passes
    other = AttentionResteering(inversion=inversion(steps=4))
    other.prepare(backbone, [pair], tmp_path, 0)
    assert not torch.equal(other.found["mona lisa"].states, found.states)
    loss = align.loss(backbone, pair, None, TrainingBatch(Z_T, T, 1), seeded())["attention"]
    named = AttentionResteering().loss(backbone, pair, None, TrainingBatch(Z_T, T, 1, {"prompts": PROMPTS}), seeded())[
        "attention"
    ]
    assert float(loss) > 0 and not torch.allclose(loss, named)


class OnGpu(Tensor):
    """Imitates a tensor on another device: its `cpu` returns a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.as_subclass(Tensor)


def test_learned_prompts_are_on_one_device(
    backbone: Any, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss compares fields of a text with each other, so all of them must be on one device."""
    part = inversion()
    plain = backbone.encode([NamedPrompt.of("a photo of {}", "mona lisa")])
    values = {name: value for name, value in vars(plain).items() if value is not None}
    there = {name: value.as_subclass(OnGpu) for name, value in {**values, "pooled": torch.ones(1, 4)}.items()}
    monkeypatch.setattr(TextualInversion, "invert", lambda *_: torch.zeros(3, 32))
    monkeypatch.setattr(TextualInversion, "_prompt", lambda *_: replace(plain, **there))
    (found,) = part(backbone, [pair], tmp_path, 0)
    assert {name: type(getattr(found, name)) for name in there} == dict.fromkeys(there, Tensor)


@pytest.mark.parametrize("settings", [{"pooler": "all"}, {"steps": -1}, {"lr": 0.0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(AttentionResteering, **settings)


@pytest.mark.parametrize(
    "settings", [{"steps": -1}, {"tokens": 0}, {"prompt": "a photo"}, {"images": AnchorBank(of="target")}]
)
def test_bad_inversions_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=next(iter(settings)) if "images" not in settings else r"method\.align\.inversion"
    ):
        built(TextualInversion, inversion, **settings)


def test_missing_prompts_and_gradient_checkpointing_are_refused(backbone: Any, new_backbone: Any, pair: Pair) -> None:
    with pytest.raises(UserError, match="give="):
        AttentionResteering().loss(backbone, pair, None, TrainingBatch(Z_T, T, 1), seeded())
    checkpointed = new_backbone(gradient_checkpointing=True)
    with pytest.raises(UserError, match="gradient_checkpointing"):
        AttentionResteering().loss(checkpointed, pair, None, TrainingBatch(Z_T, T, 1, {"prompts": PROMPTS}), seeded())
