"""What the U-Net's cross-attention looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn


@contextmanager
def recorded(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """{"<path>.attn2": probabilities (B, heads, pixels, T)} of the latest forward pass, with their gradient.

    Only plain attention has probabilities to keep, so cross-attention runs plainly within, and by its own processor
    again after.
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


def _keeping(scores: Callable[..., Tensor], maps: dict[str, Tensor], name: str, heads: int) -> Callable[..., Tensor]:
    def keep(*args: Any, **settings: Any) -> Tensor:
        found = scores(*args, **settings)
        maps[name] = found.unflatten(0, (-1, heads))
        return found

    return keep
