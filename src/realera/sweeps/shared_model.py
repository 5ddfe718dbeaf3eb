"""Keeps the original model for the next job of a sweep in the same process. The model is loaded once, and reused only
if the last job left it unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from realera.contracts import Backbone
from realera.costs import Meter
from realera.runs import folders, steps
from realera.settings import composition
from realera.settings.run_settings import Settings

PIECE = 1 << 24  # number of values summed at a time


@dataclass(frozen=True)
class Kept:
    """A backbone, and its state (`state_of`) right after it was loaded."""

    key: str
    backbone: Backbone
    state: tuple[Any, ...]


_kept_models: list[Kept] = []  # at most one


@contextmanager
def shared_backbone(config: Mapping[str, Any], meter: Meter | None = None) -> Iterator[Backbone]:
    """The unedited backbone of a resolved config, as `steps.load_backbone` gives it. In a sweep it is kept for the next
    job, unless this job fails or has changed it; then the next job loads its own."""
    if not composition.in_sweep():
        yield steps.load_backbone(config, meter)
        return
    settings = Settings(config)
    device = steps.device(settings.trainer)
    key = json.dumps([settings.backbone.node, folders.weights_of(config), device], sort_keys=True, default=str)
    kept = _kept_models.pop() if _kept_models else None
    if kept is None or kept.key != key:
        del kept  # before the next one is loaded: two may not fit into memory
        backbone = steps.load_backbone(config, meter)
        kept = Kept(key, backbone, state_of(backbone))
    elif meter is not None:
        with meter.stage("load"):
            meter.watch(kept.backbone, device)
    yield kept.backbone
    if restore(kept.backbone, device, kept.state):
        _kept_models.append(kept)


def restore(backbone: Backbone, device: str, state: tuple[Any, ...]) -> bool:
    """Undoes a job's changes to the backbone. Returns whether its state is then `state`."""
    backbone.load_erased({})
    backbone.to(device)
    for network in _networks(backbone):
        network.eval()
        for parameter in network.parameters():
            parameter.grad = None
    return state_of(backbone) == state


def state_of(backbone: Backbone) -> tuple[Any, ...]:
    """Everything that must be equal for two jobs to get the same numbers: each module's name, class, mode and number of
    hooks, and each parameter's and buffer's dtype, shape and checksum."""
    found: list[Any] = []
    for network in _networks(backbone):
        for name, module in network.named_modules():
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            found.append((name, type(module).__qualname__, module.training, hooks))
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            found.append((name, str(value.dtype), value.requires_grad, tuple(value.shape), checksum(value)))
    return tuple(found)


def _networks(backbone: Backbone) -> list[nn.Module]:
    """The denoiser and all other torch modules of the backbone."""
    found: dict[int, nn.Module] = {id(backbone.denoiser): backbone.denoiser}
    to_visit: list[Any] = [backbone]
    seen: set[int] = set()
    while to_visit:
        owner = to_visit.pop()
        seen.add(id(owner))
        for value in vars(owner).values():
            if isinstance(value, nn.Module):
                found.setdefault(id(value), value)
            elif type(value).__module__.startswith("realera.") and hasattr(value, "__dict__") and id(value) not in seen:
                to_visit.append(value)
    return list(found.values())


@torch.no_grad()
def checksum(value: Tensor) -> tuple[int, int]:
    """Two sums over the bits modulo 2^64, the second weighted by position. It takes a second, a digest takes many."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    bits = value.detach().contiguous().reshape(-1).view(width)
    plain = weighted = 0
    for start in range(0, bits.numel(), PIECE):
        piece = bits[start : start + PIECE].long()
        place = torch.arange(start + 1, start + 1 + len(piece), device=piece.device)
        plain += int(piece.sum())
        weighted += int((piece * place).sum())
    return plain, weighted
