"""The original model between the jobs of a sweep that share a process: loaded once, and lent out again only if the last
job left it exactly as it was."""

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

PIECE = 1 << 24  # numbers summed at a time


@dataclass(frozen=True)
class Kept:
    """A backbone that waits, and what it was when it came from the disk."""

    key: str
    backbone: Backbone
    state: tuple[Any, ...]


_shelf: list[Kept] = []  # one: another job's model takes its place


@contextmanager
def borrowed(config: Mapping[str, Any], meter: Meter | None = None) -> Iterator[Backbone]:
    """The unedited backbone of a resolved config, as `steps.load_backbone` gives it. A job of a sweep gives it back; a
    job that fails does not, and then the next one loads its own."""
    if not composition.in_sweep():
        yield steps.load_backbone(config, meter)
        return
    key = json.dumps(
        [config["backbone"], folders.weights_of(config), steps.device(config)], sort_keys=True, default=str
    )
    kept = _shelf.pop() if _shelf else None
    if kept is None or kept.key != key:
        del kept  # before the next one is loaded: two may not fit
        backbone = steps.load_backbone(config, meter)
        kept = Kept(key, backbone, state_of(backbone))
    elif meter is not None:
        with meter.stage("load"):
            meter.watch(kept.backbone, steps.device(config))
    yield kept.backbone
    if put_back(kept.backbone, steps.device(config), kept.state):
        _shelf.append(kept)


def put_back(backbone: Backbone, device: str, state: tuple[Any, ...]) -> bool:
    """Undoes what a job did to the backbone; whether it is then what `state_of` found."""
    backbone.load_erased({})
    backbone.to(device)
    for network in _networks(backbone):
        network.eval()
        for parameter in network.parameters():
            parameter.grad = None
    return state_of(backbone) == state


def state_of(backbone: Backbone) -> tuple[Any, ...]:
    """What must be the same for two jobs to get the same numbers: every module by place and kind, with its mode and its
    hooks, and every weight and buffer by a checksum of its bits."""
    found: list[Any] = []
    for network in _networks(backbone):
        for name, module in network.named_modules():
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            found.append((name, type(module).__qualname__, module.training, hooks))
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            found.append((name, str(value.dtype), value.requires_grad, tuple(value.shape), checksum(value)))
    return tuple(found)


def _networks(backbone: Backbone) -> list[nn.Module]:
    """The U-Net and whatever else of torch the backbone holds."""
    found: dict[int, nn.Module] = {id(backbone.denoiser): backbone.denoiser}
    waiting: list[Any] = [backbone]
    met: set[int] = set()
    while waiting:
        owner = waiting.pop()
        met.add(id(owner))
        for value in vars(owner).values():
            if isinstance(value, nn.Module):
                found.setdefault(id(value), value)
            elif type(value).__module__.startswith("realera.") and hasattr(value, "__dict__") and id(value) not in met:
                waiting.append(value)
    return list(found.values())


@torch.no_grad()
def checksum(value: Tensor) -> tuple[int, int]:
    """Two sums over the bits, the second weighted by place, modulo 2^64: a second's work where a digest takes many."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    bits = value.detach().contiguous().reshape(-1).view(width)
    plain = weighted = 0
    for start in range(0, bits.numel(), PIECE):
        piece = bits[start : start + PIECE].long()
        place = torch.arange(start + 1, start + 1 + len(piece), device=piece.device)
        plain += int(piece.sum())
        weighted += int((piece * place).sum())
    return plain, weighted
