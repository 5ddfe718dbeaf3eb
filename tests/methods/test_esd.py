"""ESD against a slow, obvious loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from options import built
from realera.contracts import Edit, Pair, TrainingBatch, UserError
from realera.methods.esd import NegativeGuidance
from realera.training.checkpoint import load_erased, read_erased
from realera.training.fit import fit


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def student(new_backbone: Callable[..., Any]) -> Any:
    """A backbone whose weights differ from the original's."""
    backbone = new_backbone()
    backbone.apply(
        Edit(map=torch.eye(32, dtype=torch.float64) + 0.1 * torch.randn(32, 32, generator=seeded(1)).double())
    )
    backbone.unfreeze(["attn2"])
    return backbone


@pytest.fixture
def pair(student: Any, new_pairs: Callable[..., list[Pair]]) -> Pair:
    return new_pairs(student, ("mona lisa", "person"))[0]


@pytest.mark.quick(1)
@pytest.mark.parametrize("eta", [1.0, 0.0, 2.5])
def test_the_loss_and_its_gradient(eta: float, student: Any, new_backbone: Callable[..., Any], pair: Pair) -> None:
    """One latent and one forward at a time, with a second U-Net as the teacher, on the bare name and ''."""
    teacher = new_backbone()
    z_t, t = torch.randn(4, 4, 8, 8, generator=seeded(4)), torch.tensor([3, 250, 600, 999])
    align = NegativeGuidance(["attn2"], negative_guidance=eta)
    align.prepare(student, [pair], Path(), 0)
    terms = align.loss(student, pair, None, TrainingBatch(z_t, t, 1), seeded())
    assert set(terms) == {"erase"}
    slow = torch.zeros(())
    for b in range(4):
        one = z_t[b : b + 1], t[b : b + 1]
        with torch.no_grad():
            named = teacher.predict_noise(*one, teacher.encode(["mona lisa"]).states)
            unnamed = teacher.predict_noise(*one, teacher.encode([""]).states)
        out = student.predict_noise(*one, student.encode(["mona lisa"]).states)
        slow = slow + ((out - (1 + eta) * unnamed + eta * named) ** 2).mean() / 4
    assert torch.allclose(terms["erase"], slow, rtol=1e-5)
    trained = [parameter for parameter in student.unet.parameters() if parameter.requires_grad]
    fast, plain = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)]).double()
        for loss in (terms["erase"], slow)
    )
    assert (fast - plain).norm() < 1e-5 * plain.norm()


def changed(name: str, overrides: list[str], fixtures: Any, to: Path) -> tuple[Any, set[str]]:
    new_backbone, new_pairs, load_method = fixtures
    backbone = new_backbone()
    method = load_method(name, "align.steps=1", *overrides)
    pairs = new_pairs(backbone, ("cat", "field"))
    fit(backbone, method, pairs, run_dir=to, seed=0, config={}, trainer={"accelerator": "cpu"}, cache=to)
    return backbone, set(read_erased(to / "erased.safetensors").state)


@pytest.fixture
def fixtures(new_backbone: Any, new_pairs: Any, load_method: Any) -> Any:
    return new_backbone, new_pairs, load_method


def test_esd_u_saves_what_it_changed_and_loads_back_bit_for_bit(fixtures: Any, tmp_path: Path) -> None:
    """All but the cross-attention, the output layers and the embedding of t."""
    erased, saved = changed("esd-u", [], fixtures, tmp_path)
    fresh = fixtures[0]()
    names = dict(fresh.unet.named_parameters())
    kept_out = ("conv_norm_out.", "conv_out.", "time_embedding.")
    wanted = {f"edit.{n}" for n in names if ".attn2." not in n and not n.startswith(kept_out)}
    # A bias directly before a group normalisation gets no gradient, so it does not change.
    assert saved <= wanted and len(wanted - saved) < 0.1 * len(wanted)
    load_erased(tmp_path / "erased.safetensors", fresh)
    for name, value in erased.unet.named_parameters():
        assert torch.equal(value, names[name])


def test_trained_weights(fixtures: Any, tmp_path: Path) -> None:
    names = {f"edit.{name}" for name, _ in fixtures[0]().unet.named_parameters()}
    _, x = changed("esd-x", [], fixtures, tmp_path / "x")
    assert x <= {name for name in names if ".attn2." in name}
    for part in ("to_q", "to_k", "to_v", "to_out"):
        assert any(f".attn2.{part}." in name for name in x)
    _, plain = changed("esd-u", ["align.norms=false"], fixtures, tmp_path / "plain")
    _, normed = changed("esd-u", [], fixtures, tmp_path / "normed")
    assert {name for name in normed if ".norm" not in name} == plain != normed


def test_without_norms_only_linear_and_convolutional_layers_are_trained(new_backbone: Callable[..., Any]) -> None:
    """All but the cross-attention, as in today's official script; conv_norm_out counts as a norm too."""
    backbone = new_backbone()
    backbone.unfreeze(NegativeGuidance(["-attn2"], norms=False).parameters)
    trained = {name for name, weight in backbone.unet.named_parameters() if weight.requires_grad}
    layers = {name: layer for name, layer in backbone.unet.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    wanted = {f"{name}.{part}" for name, layer in layers.items() for part, _ in layer.named_parameters()}
    assert trained == {name for name in wanted if ".attn2." not in name}


def test_erasing_the_empty_prompt_changes_nothing(student: Any, new_backbone: Any, new_pairs: Any) -> None:
    """Bit for bit: Adam would turn rounding errors into full steps."""
    backbone = new_backbone()
    backbone.unfreeze(["attn2"])
    pair = new_pairs(backbone, ("cat", "field"))[0]
    nothing = Pair(type(pair.concept)("", "field"), pair.target, pair.anchor)
    align = NegativeGuidance(["attn2"])
    align.prepare(backbone, [nothing], Path(), 0)
    z_t = torch.randn(3, 4, 8, 8, generator=seeded())
    loss: Tensor = align.loss(backbone, nothing, None, TrainingBatch(z_t, torch.tensor([5, 500, 900]), 1), seeded())[
        "erase"
    ]
    assert float(loss.detach()) == 0


@pytest.mark.parametrize(
    "settings", [{"parameters": []}, {"steps": -1}, {"lr": 0.0}, {"negative_guidance": float("nan")}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(NegativeGuidance, **{"parameters": ["attn2"], **settings})
