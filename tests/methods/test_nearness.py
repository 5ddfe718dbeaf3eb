"""Distances of texts from a concept, against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from realera.contracts import Edit, UserError
from realera.methods import nearness
from realera.methods.sld import SafetyGuidance
from realera.methods.spm import FacilitatedTransport

TEXTS = ["an aircraft", "a dog on the grass", "airplane", ""]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def plain(backbone: Any, images: Tensor, text: str, name: str) -> float:
    """The definition, one image and one level at a time."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def predicted(text: str, i: int, level: int) -> Tensor:
        t = torch.tensor([level])
        z = backbone.noisy_latents(images[i : i + 1], noise[i : i + 1], t)
        return backbone.predict_noise(z, t, backbone.encode([text]).states).detach().double()

    off = unit = 0.0
    for level in nearness.LEVELS:
        for i in range(len(images)):
            mine = predicted(text, i, level)
            with backbone.original():
                own, empty = predicted(name, i, level), predicted("", i, level)
            off += float((mine - own).square().sum())
            unit += float((own - empty).square().sum())
    return off / unit


def edited(backbone: Any) -> Any:
    backbone.apply(Edit(map=torch.diag(torch.linspace(0.5, 1.5, backbone.width, dtype=torch.float64))))
    return backbone


def test_ends_are_the_rows_of_the_first_end_of_text(new_backbone: Any) -> None:
    backbone = new_backbone()
    told: list[int] = []
    found = nearness.ends(backbone, TEXTS, told.append)
    read = backbone.encode(TEXTS)
    expected = torch.stack([states[int(end)] for states, end in zip(read.states, read.length)])
    assert torch.allclose(found, expected, atol=1e-5) and sum(told) == len(TEXTS)
    assert nearness.ends(backbone, []).shape == (0, backbone.width)


def test_closeness_is_a_cosine_in_the_given_coordinates() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, name, mean = (torch.randn(*size, generator=generator).double() for size in ((5, 6), (6,), (6,)))
    root = torch.randn(6, 6, generator=generator).double()
    for given in (None, root):
        moved = torch.eye(6).double() if given is None else given
        for row, cosine in zip(rows, nearness.closeness(rows, name, mean, given).tolist()):
            a, b = (row - mean) @ moved, (name - mean) @ moved
            assert cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())))
    assert nearness.nearest(torch.tensor([0.1, 0.9, 0.9, 0.2]), 3) == [1, 2, 3]


@pytest.mark.slow
def test_noise_is_compared_as_defined(new_backbone: Any, images: Tensor) -> None:
    for backbone in (new_backbone(), edited(new_backbone())):
        found = nearness.noise_distances(backbone, images, "airplane", TEXTS).tolist()
        assert found == pytest.approx([plain(backbone, images, text, "airplane") for text in TEXTS], rel=1e-4, abs=1e-6)
    before, after = (
        nearness.noise_distances(one, images, "airplane", ["airplane"]) for one in (new_backbone(), backbone)
    )
    assert float(before) < 1e-6 and float(after) > 1e-3, "the erased model is compared with the original's name"


@pytest.mark.slow
def test_the_batch_size_changes_nothing(new_backbone: Any, images: Tensor) -> None:
    backbone = new_backbone()
    together = nearness.noise_distances(backbone, images, "airplane", TEXTS)
    for at_once in (1, 2, 6):
        found = nearness.noise_distances(backbone, images, "airplane", TEXTS, at_once=at_once)
        assert torch.allclose(found, together, rtol=1e-4, atol=1e-6)


def test_a_name_like_the_empty_prompt_is_refused(new_backbone: Any, images: Tensor) -> None:
    with pytest.raises(UserError, match="the same noise for ''"):
        nearness.noise_distances(new_backbone(), images, "", TEXTS)


def test_plain_guidance_changes_nothing(new_backbone: Any, images: Tensor) -> None:
    backbone = edited(new_backbone())
    guided = nearness.noise_distances(
        backbone, images, "airplane", TEXTS, FacilitatedTransport(["airplane"], transport="none")
    )
    assert torch.allclose(guided, nearness.noise_distances(backbone, images, "airplane", TEXTS), rtol=1e-4)


@pytest.mark.slow
def test_a_guides_state_is_reset_per_batch(new_backbone: Any, images: Tensor) -> None:
    """SLD has a momentum: a text gets the same result alone, among others, and after others."""
    backbone, guide = new_backbone(), SafetyGuidance(["airplane"], strength="max")
    together = nearness.noise_distances(backbone, images, "airplane", TEXTS, guide)
    for text, value in zip(TEXTS, together.tolist()):
        assert float(nearness.noise_distances(backbone, images, "airplane", [text], guide)) == pytest.approx(
            value, rel=1e-4, abs=1e-6
        )
    assert float((together - nearness.noise_distances(backbone, images, "airplane", TEXTS)).abs().max()) > 1e-3
