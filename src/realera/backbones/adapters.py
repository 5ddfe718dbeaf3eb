"""LoRA on the denoiser or the text encoders, with peft: h = W x + (alpha / rank) B A x (arXiv 2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Generator, Tensor, nn

from realera.contracts import LoraSpec, UserError

ADAPTER = "default"


def layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """{module path: adapted layer}, in U-Net order; empty without an adapter."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def add(unet: nn.Module, spec: LoraSpec, generator: Generator, backbone: str, concepts: int = 1) -> list[nn.Parameter]:
    """Adds an adapter to every Linear and Conv2d whose path ends in one of `spec.targets`; returns the trained
    parameters, A before B for each layer. In a target, * stands for any letters.

    A is drawn from `generator` and B is zero, so the model's output does not change yet. `spec.per_concept`: the
    adapters of all concepts are joined into one of rank concepts x rank, with the scale alpha / rank of one adapter.
    Raises UserError if a target matches nothing.
    """
    if spec.rank < 1:
        raise UserError(f"LoRA rank {spec.rank} is not possible; give a whole number of 1 or more.")
    if spec.init not in ("gaussian", "kaiming"):
        raise UserError(f"LoRA init {spec.init!r} is not known; choose gaussian or kaiming.")
    found: list[str] = []
    for target in spec.targets:
        matched = [name for name in _adaptable(unet) if fnmatchcase(f".{name}", f"*.{target}")]
        if not matched:
            raise UserError(
                f"LoRA target {target!r} matched 0 layers of backbone {backbone}; it has: {', '.join(_endings(unet))}."
            )
        found += matched
    if not found:
        raise UserError(f"The LoRA has no targets; give some of: {', '.join(_endings(unet))}.")
    copies = concepts if spec.per_concept else 1
    _inject(unet, found, spec.rank * copies, spec.alpha * copies)
    trained: list[nn.Parameter] = []
    for layer in layers(unet).values():
        down, up = _weights(layer)
        start = torch.empty(down.shape, dtype=torch.float32, device=generator.device)
        if spec.init == "gaussian":
            nn.init.normal_(start, std=1 / spec.rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        down.data.copy_(start)
        up.data.zero_()
        trained += [down, up]
    return trained


def remove(unet: nn.Module) -> None:
    """Puts the plain layers back and discards the adapter."""
    for name, layer in layers(unet).items():
        parent, _, attribute = name.rpartition(".")
        setattr(unet.get_submodule(parent), attribute, layer.get_base_layer())
    if hasattr(unet, "peft_config"):
        del unet.peft_config


def deltas(unet: nn.Module) -> dict[str, Tensor]:
    """{module path: (alpha / rank) B A} in the shape of the layer's weight, float32."""
    return {name: layer.get_delta_weight(ADAPTER).detach() for name, layer in layers(unet).items()}


def taken(unet: nn.Module) -> dict[str, Tensor]:
    """`deltas`, after the adapter was removed."""
    found = deltas(unet)
    remove(unet)
    return found


@contextmanager
def disabled(unet: nn.Module) -> Iterator[None]:
    """Switches adapters off inside this context. peft also changes requires_grad; it is restored here."""
    found = list(layers(unet).values())
    flags = [(parameter, parameter.requires_grad) for layer in found for parameter in layer.parameters()]
    try:
        for layer in found:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in found:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def scaled(unet: nn.Module, scale: Tensor) -> Iterator[None]:
    """Multiplies the adapter of concept i by scale[b, i] for sample b; scale (B, concepts) or (1, concepts). With
    guidance the batch consists of several parts of B samples each.

    The factor is applied once, to A x: h = W x + (alpha / rank) B (s * A x). With a scale (B, concepts, concepts), B_i
    is applied to sum_j scale[b, i, j] A_j x.
    """

    def times(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        rank, concepts = output.shape[1 if isinstance(module, nn.Conv2d) else -1], scale.shape[1]
        if rank % concepts:
            raise ValueError(f"an adapter of rank {rank} cannot be split into {concepts} concepts")
        if scale.dim() == 3:
            return _mixed(scale.to(output), output, 1 if isinstance(module, nn.Conv2d) else -1)
        factors = scale.to(output).repeat_interleave(rank // concepts, dim=1)
        if len(factors) > 1:
            factors = factors.repeat(len(output) // len(factors), 1)
        middle = (1,) * (output.dim() - 2)
        shape = (-1, rank, *middle) if isinstance(module, nn.Conv2d) else (-1, *middle, rank)
        return output * factors.view(shape)

    hooks = [layer.lora_A[ADAPTER].register_forward_hook(times) for layer in layers(unet).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mixed(mixing: Tensor, output: Tensor, axis: int) -> Tensor:
    """sum_j mixing[b, i, j] A_j x for every concept i; the rank is axis `axis` of output."""
    parts = output.movedim(axis, -1).unflatten(-1, (mixing.shape[1], -1))
    mixing = mixing.repeat(len(output) // len(mixing), 1, 1)
    return torch.einsum("bij,b...jr->b...ir", mixing, parts).flatten(-2).movedim(-1, axis)


def state(unet: nn.Module) -> dict[str, Tensor]:
    """{"<module path>.down": A (rank, in), ".up": B (out, rank), ".alpha": ()} as copies on the CPU."""
    saved: dict[str, Tensor] = {}
    for name, layer in layers(unet).items():
        down, up = _weights(layer)
        saved[f"{name}.down"] = down.detach().cpu().clone()
        saved[f"{name}.up"] = up.detach().cpu().clone()
        saved[f"{name}.alpha"] = torch.tensor(float(layer.lora_alpha[ADAPTER]))
    return saved


def load(unet: nn.Module, saved: Mapping[str, Tensor], backbone: str) -> None:
    """The inverse of `state`, on a U-Net without adapters; the parameters are frozen. Raises UserError for tensors that
    do not fit. Without an ".alpha", alpha = rank, a scale of 1.
    """
    if not saved:
        return
    names = sorted({key.rpartition(".")[0] for key in saved})
    if unknown := [name for name in names if name not in set(_adaptable(unet))]:
        raise UserError(
            f"The erased weights have a LoRA on {unknown[0]!r}, which backbone {backbone} does not have; use the "
            "backbone it was trained on."
        )
    if lacking := [f"{name}.{part}" for name in names for part in ("down", "up") if f"{name}.{part}" not in saved]:
        raise UserError(f"The erased weights lack {lacking[0]!r}: the file is incomplete, so make it again.")
    ranks = {saved[f"{name}.down"].shape[0] for name in names}
    alphas = {float(saved[f"{name}.alpha"]) for name in names if f"{name}.alpha" in saved} or {float(next(iter(ranks)))}
    if len(ranks) > 1 or len(alphas) > 1:
        raise UserError(
            f"The erased weights mix LoRA ranks {sorted(ranks)} or alphas {sorted(alphas)}; save one adapter at a time."
        )
    _inject(unet, names, ranks.pop(), alphas.pop())
    for name, layer in layers(unet).items():
        for parameter, part in zip(_weights(layer), ("down", "up"), strict=True):
            given = saved[f"{name}.{part}"]
            if given.shape != parameter.shape:
                remove(unet)
                raise UserError(
                    f"The LoRA weight {name}.{part} is {tuple(given.shape)} in the file and {tuple(parameter.shape)} "
                    f"in backbone {backbone}; use the backbone it was trained on."
                )
            parameter.data.copy_(given)
            parameter.requires_grad_(False)


def _inject(unet: nn.Module, names: Iterable[str], rank: int, alpha: float) -> None:
    paths = "|".join(re.escape(name) for name in names)  # a pattern matches whole paths; a list would match suffixes
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths)
    with torch.random.fork_rng(devices=[]):  # peft draws an initial A from the global generator
        inject_adapter_in_model(config, unet, ADAPTER)
    for layer in layers(unet).values():
        for parameter in _weights(layer):
            parameter.data = parameter.data.float()  # in bfloat16, steps of 1e-5 would be rounded away
    unet.eval()


def _weights(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _adaptable(unet: nn.Module) -> list[str]:
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _endings(unet: nn.Module) -> list[str]:
    """The distinct suffixes of attention layers that a user can give as targets ("attn2.to_k", "attn.add_k_proj")."""
    found = (re.search(r"attn\d?\.(to|add)_\w+(\.\d+)?$", name) for name in _adaptable(unet))
    return sorted({match.group() for match in found if match})
