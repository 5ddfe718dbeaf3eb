"""AC against a slow, obvious loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from options import built, method_settings
from realera.contracts import Edit, Pair, TrainingBatch, UserError
from realera.methods.ac import Ablation
from realera.settings.resolvers import register_resolvers

KV = ("attn2.to_k", "attn2.to_v")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def student(new_backbone: Callable[..., Any]) -> Any:
    """A backbone whose weights differ from the original's."""
    backbone = new_backbone()
    backbone.apply(
        Edit(map=torch.eye(32, dtype=torch.float64) + 0.1 * torch.randn(32, 32, generator=seeded(1)).double())
    )
    backbone.unfreeze(KV)
    return backbone


@pytest.fixture
def pair(student: Any, new_pairs: Callable[..., list[Pair]]) -> Pair:
    return new_pairs(student, ("mona lisa", "person"))[0]


def batch() -> dict[str, Tensor]:
    return {
        "latents": torch.randn(4, 4, 8, 8, generator=seeded(4)),
        "timesteps": torch.tensor([3, 250, 600, 999]),
        "noise": torch.randn(4, 4, 8, 8, generator=seeded(5)),
        "prompts": torch.tensor([2, 0, 2, 1]),
    }


def step_of(made: dict[str, Tensor]) -> TrainingBatch:
    known = {name: value for name, value in made.items() if name not in ("latents", "timesteps")}
    return TrainingBatch(made["latents"], made["timesteps"], 1, known)


def given(align: Ablation, student: Any, pair: Pair) -> dict[str, Tensor]:
    return align.loss(student, pair, None, step_of(batch()), seeded())


def gradients(backbone: Any, loss: Tensor) -> Tensor:
    trained = [parameter for parameter in backbone.unet.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)]).double()


@pytest.mark.parametrize("variant", ["model", "noise"])
@pytest.mark.parametrize("prior", [0.0, 0.7])
def test_the_loss_and_its_gradient(
    variant: Any, prior: float, student: Any, new_backbone: Callable[..., Any], pair: Pair
) -> None:
    """One latent and one forward at a time; the target is the student's own, not the original's."""
    terms = given(Ablation(KV, variant=variant, prior=prior, detach_bos=False), student, pair)
    assert set(terms) == ({"ablate", "prior"} if prior else {"ablate"})
    templates = ["a photo of the {}", "a {}", "a big drawing of {}"]
    made = batch()
    slow = torch.zeros(())
    for b in range(4):
        one = made["latents"][b : b + 1], made["timesteps"][b : b + 1]
        noise, text = made["noise"][b : b + 1], templates[int(made["prompts"][b])]
        anchored = student.predict_noise(*one, student.encode([text.format("person")]).states)
        out = student.predict_noise(*one, student.encode([text.format("mona lisa")]).states)
        target = anchored.detach() if variant == "model" else noise
        slow = slow + ((out - target) ** 2).mean() / 4 + prior * ((anchored - noise) ** 2).mean() / 4
    loss = torch.stack(list(terms.values())).sum()
    assert torch.allclose(loss, slow, rtol=1e-5)
    fast, plain = gradients(student, loss), gradients(student, slow)
    assert (fast - plain).norm() < 1e-5 * plain.norm()


def test_bos_gives_no_gradient(student: Any, new_backbone: Callable[..., Any], pair: Pair) -> None:
    """The gradient equals that of a U-Net in which BOS uses a second, frozen copy of the weights."""

    def split(frozen: Any) -> Any:
        def forward(layer: Any, inputs: Any, out: Tensor) -> Tensor:
            return torch.where(torch.arange(out.shape[1])[:, None] == 0, frozen(inputs[0]), out)

        return forward

    free = given(Ablation(KV, detach_bos=False), student, pair)["ablate"]
    detached = given(Ablation(KV), student, pair)["ablate"]
    assert torch.equal(free, detached)
    found = gradients(student, detached)
    assert not torch.allclose(found, gradients(student, free), rtol=1e-2)
    twin = new_backbone()
    twin.load_erased(student.erased_state())
    frozen = twin.text_projections()
    for name, layer in student.text_projections().items():
        layer.register_forward_hook(split(frozen[name]))
    other = gradients(student, given(Ablation(KV, detach_bos=False), student, pair)["ablate"])
    assert (found - other).norm() < 1e-5 * other.norm()


def test_detach_bos_is_refused_with_gradient_checkpointing(new_backbone: Callable[..., Any], pair: Pair) -> None:
    backbone = new_backbone(gradient_checkpointing=True)
    with pytest.raises(UserError, match="detach_bos"):
        given(Ablation(KV), backbone, pair)
    assert given(Ablation(KV, detach_bos=False), backbone, pair)["ablate"] > 0


def test_numbers_for_nudity_are_the_official_ones() -> None:
    """The miniature's numbers are those of its search."""
    register_resolvers()
    nudity, others = (["attn1", "attn2"], 1.0, 400, 6.4e-5), (list(KV), 0.0, 100, 1.6e-5)
    for task, numbers, chosen in (
        ("nsfw.NsfwTask", nudity, (400, 3e-5)),
        ("objects.ObjectTask", others, (200, 1e-4)),
        ("styles.StyleTask", others, (200, 1e-4)),
    ):
        for backbone, wanted in (("sd14", numbers), ("mini", (list(KV), 0.0, *chosen))):
            given = {"backbone": {"name": backbone}, "task": {"_target_": f"realera.tasks.{task}"}}
            align = OmegaConf.create({**given, "method": method_settings("ac")}).method.align
            assert (align.parameters, align.prior, align.steps, align.lr) == wanted, (task, backbone)


def test_missing_prompts_are_refused(student: Any, pair: Pair) -> None:
    made = batch()
    del made["prompts"]
    with pytest.raises(UserError, match=r"prompts.*method\.latents\.give"):
        Ablation(KV).loss(student, pair, None, step_of(made), seeded())


@pytest.mark.parametrize(
    "settings", [{"parameters": []}, {"variant": "images"}, {"steps": -1}, {"lr": float("inf")}, {"prior": -1.0}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(Ablation, **{"parameters": KV, **settings})
