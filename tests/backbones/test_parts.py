"""Features of a backbone for other methods than RealEra: adapters by concept, attention maps, unfreezing, passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from realera.contracts import LoraSpec, UserError

ALL = ("attn2.to_k", "attn2.to_v", "ff.net.2", "conv1")


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def predict(backbone: Any, texts: list[str]) -> Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=draw(3)).expand(len(texts), -1, -1, -1)
    out: Tensor = backbone.predict_noise(latents, torch.tensor([500] * len(texts)), backbone.encode(texts).states)
    return out


def trained(backbone: Any, spec: LoraSpec, concepts: int) -> Any:
    """The backbone with an adapter whose B is not zero."""
    for parameter in backbone.add_adapter(spec, draw(1), concepts):
        nn.init.normal_(parameter, std=0.1, generator=draw(parameter.numel()))
    return backbone


def only(backbone: Any, new_backbone: Callable[..., Any], concept: int, rank: int, spec: LoraSpec) -> Any:
    """A new backbone with only one concept's adapter, cut out of the joined adapters."""
    state = backbone.erased_state()
    rows = slice(concept * rank, (concept + 1) * rank)
    for key, value in state.items():
        if key.endswith(".down"):
            state[key] = value[rows]
        elif key.endswith(".up"):
            state[key] = value[:, rows]
        elif key.endswith(".alpha"):
            state[key] = torch.tensor(spec.alpha)
    alone = new_backbone()
    alone.load_erased(state)
    return alone


@pytest.mark.parametrize("targets", [ALL[:2], ALL])
def test_joined_adapters_equal_separate_adapters(targets: Any, new_backbone: Callable[..., Any]) -> None:
    spec = LoraSpec(rank=2, alpha=3.0, targets=targets, per_concept=True)
    backbone = trained(new_backbone(), spec, 3)
    with torch.no_grad():
        first, third = (only(backbone, new_backbone, i, 2, spec) for i in (0, 2))
        texts = ["a cat", "a dog"]
        rows = torch.stack([predict(first, texts)[0], predict(third, texts)[1]])
        with backbone.adapter_scale(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])):
            torch.testing.assert_close(predict(backbone, texts), rows, atol=1e-5, rtol=1e-4)
            twice = predict(backbone, texts * 2)  # as with guidance
        torch.testing.assert_close(twice, rows.repeat(2, 1, 1, 1), atol=1e-5, rtol=1e-4)
        with backbone.adapter_scale(torch.zeros(1, 3)), backbone.original():
            plain = predict(backbone, texts)
        with backbone.adapter_scale(torch.zeros(1, 3)):
            torch.testing.assert_close(predict(backbone, texts), plain)
        everything = predict(backbone, texts)
        with backbone.adapter_scale(torch.ones(1, 3)):
            assert torch.equal(predict(backbone, texts), everything)
        with backbone.adapter_scale(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]).diag_embed()):  # a diagonal mixing matrix
            torch.testing.assert_close(predict(backbone, texts), rows, atol=1e-5, rtol=1e-4)
    with backbone.adapter_scale(torch.ones(1, 4)), pytest.raises(ValueError, match="6 cannot be split into 4"):
        predict(backbone, texts)


def test_one_concept_trains_its_own_rows(new_backbone: Callable[..., Any]) -> None:
    backbone = trained(new_backbone(), LoraSpec(rank=1, per_concept=True), 2)
    with backbone.adapter_scale(torch.tensor([[0.0, 1.0]])):
        predict(backbone, ["a cat"]).square().sum().backward()
    for name, parameter in backbone.unet.named_parameters():
        if "lora_A" in name:
            assert parameter.grad[0].abs().sum() == 0 < parameter.grad[1].abs().sum()


def test_initial_weights_have_the_distribution_of_one_adapter(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    down = backbone.add_adapter(LoraSpec(rank=1, per_concept=True), draw(1), 40)[0]
    assert len(down) == 40 and 0.9 < float(down.detach().std()) < 1.1


def test_attention_maps(new_backbone: Callable[..., Any]) -> None:
    """Maps are probabilities over the tokens, with gradients; recording does not change the images."""
    backbone = new_backbone(attention="sdpa")
    adapted = backbone.add_adapter(LoraSpec(), draw(1))
    nn.init.normal_(adapted[1], generator=draw(2))
    plain = predict(backbone, ["a cat", "a dog"])
    with backbone.attention() as maps:
        found = predict(backbone, ["a cat", "a dog"])
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    assert len(maps) == len(backbone.text_projections()) // 2
    for name, probabilities in maps.items():
        attention = backbone.unet.get_submodule(name)
        assert probabilities.shape[:2] == (2, attention.heads) and probabilities.shape[3] == backbone.max_length
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:3]))
    sum(p[..., 3].sum() for p in maps.values()).backward()
    assert adapted[0].grad is not None and adapted[0].grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(predict(backbone, ["a cat", "a dog"]), plain)


def test_unfreezing_chosen_weights(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    names = {id(parameter): name for name, parameter in backbone.unet.named_parameters()}

    def chosen(*targets: str) -> set[str]:
        return {names[id(parameter)] for parameter in backbone.unfreeze(targets)}

    cross = {name for name in names.values() if ".attn2." in name}
    assert chosen("attn2") == cross
    assert chosen("attn2", "-to_q") == {name for name in cross if ".to_q." not in name}
    assert chosen("-attn2", "-time_embedding") == {
        name for name in names.values() if ".attn2." not in name and not name.startswith("time_embedding.")
    }
    assert chosen("all") == set(names.values())
    assert chosen("all", "-attn2") == set(names.values()) - cross
    for wrong in ("attn9", "-attn9"):
        with pytest.raises(UserError, match=r"'-?attn9' matched 0"):
            backbone.unfreeze([wrong])


def test_passes_are_counted(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    with torch.no_grad():
        predict(backbone, ["a cat", "a dog"])
        assert backbone.passes == 2
        backbone.generate(["a cat"], [0])
    assert backbone.passes == 2 + 2 * backbone.sampler.steps
