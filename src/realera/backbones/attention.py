"""Attention maps of the U-Net, and cross-attention keys and values that are computed only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn


@contextmanager
def recorded(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """{"<path>.attn2": probabilities (B, heads, pixels, T)} of the latest forward pass, with gradients.

    Only plain attention computes the probabilities, so cross-attention uses the plain processor inside this context.
    """
    found = {name: module for name, module in unet.named_modules() if name.endswith("attn2")}
    maps: dict[str, Tensor] = {}
    own = {name: module.processor for name, module in found.items()}
    try:
        for name, module in found.items():
            assert isinstance(module, Attention)
            module.processor = AttnProcessor()
            module.get_attention_scores = _keeping(module.get_attention_scores, maps, name, module.heads)
        yield maps
    finally:
        for name, module in found.items():
            module.processor = own[name]
            vars(module).pop("get_attention_scores", None)


class ReadOnce:
    """Keys and values of cross-attention are computed in the first pass and reused in the others. So W_K and W_V, with
    their adapters, are applied to the text states once and not in every step."""

    def __init__(self, unet: nn.Module) -> None:
        readers = [module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
        self.forwards = [(module, vars(module).get("forward"), _once(module.forward)) for module in readers]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            for module, _, once in self.forwards:
                module.forward = once
            yield
        finally:
            for module, own, _ in self.forwards:
                if own is None:  # it was the method of the class
                    vars(module).pop("forward", None)
                else:
                    module.forward = own


def _once(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    kept: list[Tensor] = []

    def first(*args: Any, **settings: Any) -> Tensor:
        if not kept:
            kept.append(forward(*args, **settings))
        return kept[0]

    return first


def _keeping(scores: Callable[..., Tensor], maps: dict[str, Tensor], name: str, heads: int) -> Callable[..., Tensor]:
    def keep(*args: Any, **settings: Any) -> Tensor:
        found = scores(*args, **settings)
        maps[name] = found.unflatten(0, (-1, heads))
        return found

    return keep
