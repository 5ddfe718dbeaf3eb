"""Receler against a slow, obvious loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from options import built
from realera.backbones import erasers
from realera.contracts import EraserSpec, Pair, TrainingBatch, UserError
from realera.methods.receler import AttackedRollout, ReliableErasing, with_rows

NAME = "mona lisa"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def student(new_backbone: Callable[..., Any]) -> Any:
    """A backbone whose erasers change something."""
    backbone = new_backbone()
    with torch.no_grad():
        for weight in backbone.add_adapter(EraserSpec(6), seeded()):
            weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(weight.numel())))
    return backbone


@pytest.fixture
def pair(new_backbone: Callable[..., Any], new_pairs: Callable[..., list[Pair]]) -> Pair:
    return new_pairs(new_backbone(), (NAME, "person"))[0]


def keep(name: str, into: dict[str, Tensor], module: Any, args: Any, out: Tensor) -> None:
    into[name] = out


def name_rows(backbone: Any) -> list[int]:
    return list(range(1, 1 + len(backbone.text.tokenizer(NAME, add_special_tokens=False)["input_ids"])))


def maps_of(teacher: Any, z: Tensor, t: Tensor) -> dict[str, Tensor]:
    """{name of an attn2: probabilities (heads, pixels, T)} by the matrix products of attention, in hooks."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            q, k = module.to_q(args[0]), module.to_k(kwargs["encoder_hidden_states"])
            q, k = (x[0].unflatten(-1, (module.heads, -1)).transpose(0, 1) for x in (q, k))
            found[name] = (q @ k.transpose(1, 2) * module.scale).softmax(-1)

        return hook

    modules = [(n, m) for n, m in teacher.unet.named_modules() if n.endswith("attn2")]
    hooks = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules]
    teacher.predict_noise(z, t, teacher.encode([NAME]).states)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("shrink", "threshold"), [(1, 0.1), (2, 0.6)])
def test_the_loss_and_its_gradient(
    shrink: int, threshold: float, student: Any, new_backbone: Callable[..., Any], pair: Pair
) -> None:
    teacher = new_backbone()
    z_t, t = torch.randn(2, 4, 8, 8, generator=seeded(4)), torch.tensor([250, 600])
    rows = torch.rand(2, 5, 32, generator=seeded(5))
    align = built(
        ReliableErasing, eraser=EraserSpec(6), negative_guidance=1.5, reg_weight=0.7,
        mask_threshold=threshold, mask_shrink=shrink,
    )  # fmt: skip
    align.prepare(student, [pair], Path(), 0)
    terms = align.loss(student, pair, None, TrainingBatch(z_t, t, 1, {"rows": rows}), seeded())
    own = name_rows(teacher)
    erase = outside = torch.zeros(())
    for b in range(2):
        one = z_t[b : b + 1], t[b : b + 1]
        with torch.no_grad():
            maps = maps_of(teacher, *one)
            named, empty = (teacher.predict_noise(*one, teacher.encode([text]).states) for text in (NAME, ""))
        side = 8 // shrink
        chosen = [m[:, :, own].mean(-1).mean(0).reshape(side, side) for m in maps.values() if m.shape[1] == side**2]
        mean = sum(chosen) / len(chosen)
        mask = ((mean - mean.min()) / (mean.max() - mean.min()) >= threshold).float()
        states = teacher.encode([NAME]).states.clone()
        states[:, own[-1] + 1 : own[-1] + 6] = rows[b]
        added: dict[str, Tensor] = {}

        hooks = [e.register_forward_hook(partial(keep, n, added)) for n, e in erasers.found(student.unet).items()]
        out = student.predict_noise(*one, states)
        for hook in hooks:
            hook.remove()
        erase = erase + ((out - (2.5 * empty - 1.5 * named)) ** 2).mean() / 2
        for change in added.values():
            width = int(change.shape[1] ** 0.5)
            step = torch.arange(width) * side // width  # nearest
            other = 1 - mask[step][:, step]
            each = (change[0].T.reshape(-1, width, width) * other) ** 2
            outside = outside + each.mean(0).sum() / (other.sum() + 1e-9) / len(added) / 2
    assert torch.allclose(terms["erase"], erase, rtol=1e-4) and torch.allclose(
        terms["outside"], 0.7 * outside, rtol=1e-4
    )
    assert outside > 0
    weights = [weight for weight in student.unet.parameters() if weight.requires_grad]
    fast, slow = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        for loss in (sum(terms.values()), erase + 0.7 * outside)
    )
    assert torch.allclose(fast, slow, rtol=1e-2, atol=1e-4 * float(slow.abs().max()))


def test_the_attack_is_adam_that_carries_over(student: Any, new_backbone: Callable[..., Any], pair: Pair) -> None:
    """Two calls of three steps, by hand; the loss sees the rows before the last step of a call."""
    source = built(AttackedRollout, attacks=3, rows=4, attack_lr=0.1, attack_decay=0.2, steps=3, batch=2)
    source.prepare(student, [pair], Path(), 0)
    teacher, own = new_backbone(), name_rows(new_backbone())
    rows: Tensor | None = None
    mean = square = torch.zeros(4, 32)
    count = 0
    for step in range(2):
        generator = seeded(step)
        z, t, known = source(student, 0, generator)
        if rows is None:
            rows = torch.rand(4, 32, generator=seeded(step))
            assert bool(((rows >= 0) & (rows < 1)).all())
        with torch.no_grad():
            goal = teacher.predict_noise(z, t, teacher.encode([NAME] * 2).states)
        for _ in range(3):
            before = rows
            leaf = rows.clone().requires_grad_(True)
            states = teacher.encode([NAME] * 2).states
            states = torch.cat([states[:, : own[-1] + 1], leaf.expand(2, -1, -1), states[:, own[-1] + 5 :]], dim=1)
            loss = ((student.predict_noise(z, t, states) - goal) ** 2).mean()
            gradient = torch.autograd.grad(loss, [leaf])[0] + 0.2 * rows
            count += 1
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            rows = rows - 0.1 * (mean / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        assert known["rows"].shape == (2, 4, 32) and torch.allclose(known["rows"][0], before, atol=1e-4)
    assert torch.allclose(source.attackers[0]["prompt"], rows, atol=1e-4)
    assert all(weight.grad is None for weight in student.unet.parameters())


def test_a_resumed_attack_goes_on(student: Any, pair: Pair) -> None:
    first, second = (built(AttackedRollout, attacks=2, rows=4, steps=3, renew=2, chains=2) for _ in range(2))
    for source in (first, second):
        source.prepare(student, [pair], Path(), 0)
    first(student, 0, seeded(0))
    state = first.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == first.state_form([1])
    assert all(value.dtype == torch.float32 for value in state.values()) and first.state_form([0]) == {}
    second.load_state_dict(state, [1])
    one, two = first(student, 0, seeded(1)), second(student, 0, seeded(1))
    assert torch.equal(one[0], two[0]) and torch.equal(one[2]["rows"], two[2]["rows"])


def test_rows_stand_behind_the_name(new_backbone: Callable[..., Any], pair: Pair) -> None:
    texts, rows = pair.target, torch.zeros(3, 32)
    found = with_rows(texts, rows).states
    last = int(texts.last[0])
    assert torch.equal(found[:, : last + 1], texts.states[:, : last + 1]) and not found[:, last + 1 : last + 4].any()
    assert torch.equal(found[:, last + 4 :], texts.states[:, last + 4 :])


def test_refusals(student: Any, pair: Pair) -> None:
    with pytest.raises(UserError, match="100 adversarial rows do not fit behind 'mona lisa' in 77 token rows"):
        built(AttackedRollout, rows=100).prepare(student, [pair], Path(), 0)
    align = built(ReliableErasing, eraser=EraserSpec(6), mask_shrink=8)
    align.prepare(student, [pair], Path(), 0)
    batch = TrainingBatch(torch.randn(1, 4, 8, 8), torch.tensor([5]), 1)
    with pytest.raises(UserError, match=r"No attention map is 8 times smaller .* one of 1, 2"):
        align.loss(student, pair, None, batch, seeded())


def test_what_a_plan_counts() -> None:
    node = {"steps": 50, "batch": 1, "renew": 1, "attacks": 50}
    assert AttackedRollout.passes(node, 99) == 50 + 1 + 150 and ReliableErasing.passes({}, 99) == 5
    assert AttackedRollout.passes({**node, "attacks": 0}, 99) == 50
