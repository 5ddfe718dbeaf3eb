"""Erasers behind the cross-attention of a U-Net (Receler, arXiv 2311.17717): o + W2 gelu(W1 o + b1) + b2 in place of o.

An eraser is the child `eraser` of its attn2 module, and a hook of that module adds its output. All other modules keep
their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import gelu

from realera.contracts import EraserSpec, UserError

CHILD = "eraser"
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


class Eraser(nn.Module):
    """(..., width) -> (..., width), in float32. active: False = the module's output is not changed."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.active = True
        self.hook: Any = None

    def forward(self, output: Tensor) -> Tensor:
        changed: Tensor = self.up(gelu(self.down(output.to(self.down.weight.dtype))))
        return changed.to(output.dtype)


def found(unet: nn.Module) -> dict[str, Eraser]:
    """{path of an attn2 module: its eraser}, in U-Net order; empty without erasers."""
    ending = f".{CHILD}"
    return {n.removesuffix(ending): one for n, one in unet.named_modules() if isinstance(one, Eraser)}


def add(unet: nn.Module, spec: EraserSpec, generator: Generator) -> list[nn.Parameter]:
    """Adds an eraser behind every attn2 module and returns the trained parameters.

    W1 and b1 are drawn from `generator` as torch draws a Linear layer's; W2 and b2 are 0, so nothing changes yet.
    Raises UserError for a rank below 1.
    """
    if spec.rank < 1:
        raise UserError(f"Eraser rank {spec.rank} is not possible; give a whole number of 1 or more.")
    for name, attention in _attentions(unet).items():
        eraser = _attach(name, attention, spec.rank)
        bound = (
            attention.to_out[0].out_features ** -0.5
        )  # torch: kaiming uniform with a = sqrt(5), and 1 / sqrt(fan in)
        for start in (eraser.down.weight, eraser.down.bias):
            drawn = torch.rand(start.shape, generator=generator, device=generator.device) * 2 - 1
            start.data.copy_(bound * drawn)
        for start in (eraser.up.weight, eraser.up.bias):
            start.data.zero_()
    return [parameter for eraser in found(unet).values() for parameter in eraser.parameters()]


def remove(unet: nn.Module) -> None:
    """Discards the erasers and their hooks."""
    for name, eraser in found(unet).items():
        eraser.hook.remove()
        delattr(unet.get_submodule(name), CHILD)


@contextmanager
def disabled(unet: nn.Module) -> Iterator[None]:
    """Switches the erasers off inside this context."""
    there = list(found(unet).values())
    try:
        for eraser in there:
            eraser.active = False
        yield
    finally:
        for eraser in there:
            eraser.active = True


@contextmanager
def outputs(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """See `contracts.Backbone.eraser_outputs`."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def put(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept[name] = output

        return put

    hooks = [eraser.register_forward_hook(keep(name)) for name, eraser in found(unet).items()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def state(unet: nn.Module) -> dict[str, Tensor]:
    """{"<path of attn2>.down.weight", ".down.bias", ".up.weight", ".up.bias"} as copies on the CPU."""
    return {
        f"{name}.{part}": eraser.get_parameter(part).detach().cpu().clone()
        for name, eraser in found(unet).items()
        for part in PARTS
    }


def load(unet: nn.Module, saved: Mapping[str, Tensor], backbone: str) -> None:
    """The inverse of `state`, on a U-Net without erasers; the parameters are frozen. Raises UserError for tensors that
    do not fit; no eraser is then left."""
    if not saved:
        return
    attentions = _attentions(unet)
    wanted = {f"{name}.{part}" for name in attentions for part in PARTS}
    if saved.keys() != wanted:
        odd = min(saved.keys() ^ wanted)
        raise UserError(
            f"The erased weights and backbone {backbone} have other erasers (such as {odd}); use the backbone "
            "that they were trained on."
        )
    try:
        for name, attention in attentions.items():
            eraser = _attach(name, attention, len(saved[f"{name}.down.bias"]))
            for part in PARTS:
                parameter, given = eraser.get_parameter(part), saved[f"{name}.{part}"]
                if parameter.shape != given.shape:
                    raise UserError(
                        f"The eraser {name}.{part} is {tuple(given.shape)} in the file and {tuple(parameter.shape)} in "
                        f"backbone {backbone}; use the backbone that it was trained on."
                    )
                parameter.data.copy_(given)
                parameter.requires_grad_(False)
    except UserError:
        remove(unet)
        raise


def _attentions(unet: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in unet.named_modules() if name.endswith("attn2")}


def _attach(name: str, attention: Any, rank: int) -> Eraser:
    out: nn.Linear = getattr(attention.to_out[0], "base_layer", attention.to_out[0])
    with torch.random.fork_rng(devices=[]):  # torch draws initial weights from the global generator
        eraser = Eraser(out.out_features, rank).to(out.weight.device, torch.float32).eval()
    setattr(attention, CHILD, eraser)
    eraser.hook = attention.register_forward_hook(_erase)
    return eraser


def _erase(attention: Any, inputs: Any, output: Tensor) -> Tensor | None:
    """The hook. It finds the eraser through the module, so that a copy of the U-Net has its own."""
    eraser: Eraser = attention.eraser
    return output + eraser(output) if eraser.active else None
