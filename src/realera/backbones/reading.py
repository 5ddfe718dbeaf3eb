"""How a diffusion transformer reads text states: the linear maps whose Gram matrix is the metric of `value_space`.

A U-Net's layers read a row k of the text as W_l k. In a transformer the row passes h = W_ctx k + b, and each joint
block makes its text keys and values of a norm of the residual stream that began as h. Three readings:

    embedder    h itself: one map, W_ctx
    first       keys or values of the first block, W (1 + scale) LN(h), linearised at the rows of plain captions:
                W diag(1 + scale) J W_ctx, with the Jacobian J of the norm. G is its mean over rows and noise levels
    all         keys or values of all blocks, by the Jacobian of the whole network at plain captions

"first" is exact up to the choice of captions and needs no pass of the network. "all" also counts what later blocks
read through attention; its G = E[J^T J] is estimated by probes, since E[(J^T r)(J^T r)^T] = J^T J for r ~ N(0, I): one
backward pass gives J^T r for all rows of a caption. The result is a factor F (D, D) with F^T F = G for each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from realera.contracts import Backbone, Read

Reading = Literal["embedder", "first", "all"]
LEVELS = (0.2, 0.4, 0.6, 0.8)  # shares of the noise schedule
CAPTIONS = (  # plain texts of many kinds, none about a concept that the tasks erase
    "a photo of a wooden table in a kitchen",
    "an old stone bridge over a quiet river",
    "a woman reading a newspaper on a bench",
    "two children playing with a red ball",
    "a bowl of fresh fruit beside a window",
    "a drawing of a mountain at sunset",
    "a crowded street market in the rain",
    "a man with a hat holding an umbrella",
    "a painting of flowers in a blue vase",
    "a small house with a garden",
    "people walking along a sandy beach",
    "a close-up of a clock on a wall",
    "a plate of pasta with tomatoes",
    "a snowy forest path in winter",
    "an empty classroom with rows of chairs",
    "a guitar leaning against a brick wall",
)
PROBES = 4  # backward passes for each noise level
READERS = {"keys": ("add_k_proj",), "values": ("add_v_proj",), "both": ("add_k_proj", "add_v_proj")}
SINGLE = {
    "keys": ("to_k",),
    "values": ("to_v",),
    "both": ("to_k", "to_v"),
}  # of blocks for all rows


def readers(backbone: Backbone, network: nn.Module, read: Read, reading: Reading) -> list[Tensor]:
    """Matrices (n, D) float64 on the CPU, of the current weights; see above."""
    made = _first(backbone, network, read) if reading == "first" else _all(backbone, network, read)
    return list(made)


def _first(backbone: Backbone, network: nn.Module, read: Read) -> Iterator[Tensor]:
    """One factor for each projection of the first block."""
    block: Any = network.get_submodule("transformer_blocks.0")
    embedder = next(iter(backbone.text_projections().values()))
    parts: dict[str, list[Tensor]] = {name: [] for name in READERS[read]}
    texts = backbone.encode(list(CAPTIONS))
    rows = texts.states[:, texts.varying()]
    device, dtype = embedder.weight.device, torch.float64
    with torch.no_grad(), _ready(block):
        weight = embedder.weight.to(dtype)
        bias = embedder.bias.to(dtype)
        projections = {name: block.attn.get_submodule(name).weight.to(device, dtype) for name in READERS[read]}
        for level in LEVELS:
            scales = 1 + _scale(backbone, network, block, level, texts.pooled).to(dtype)  # (captions, width)
            for caption, scale in zip(rows.to(device, dtype), scales):
                h = caption @ weight.T + bias
                centred = h - h.mean(dim=1, keepdim=True)
                variance = centred.square().mean(dim=1, keepdim=True) + 1e-6
                unit = centred / variance.sqrt()
                for name, projection in projections.items():
                    # the norm's Jacobian is (I - 1 1^T / n - u u^T / n) / deviation, with u the normed row
                    scaled = projection * scale
                    inner = scaled.T @ scaled
                    parts[name].append(_gram_through_norm(inner, unit, variance))
    for found in parts.values():
        mean = torch.stack(found).mean(dim=0)
        yield _factor((weight.T @ mean @ weight).cpu())


def _gram_through_norm(inner: Tensor, unit: Tensor, variance: Tensor) -> Tensor:
    """The mean over rows of J^T inner J, J the Jacobian of the norm at each row. unit (T, n): normed rows; variance
    (T, 1). With P = I - 1 1^T / n and P u = u:  J = (P - u u^T / n) / s."""
    width = unit.shape[1]
    share = 1 / (variance * len(unit))
    plain = inner - inner.mean(dim=0, keepdim=True)
    plain = plain - plain.mean(dim=1, keepdim=True)  # P inner P
    through = unit @ plain  # (T, n)
    cross = (unit * share).T @ through / width
    quadratic = (through * unit).sum(dim=1, keepdim=True) * share / width**2
    result: Tensor = plain * share.sum() - cross - cross.T + (unit * quadratic).T @ unit
    return result


def _scale(backbone: Backbone, network: Any, block: Any, level: float, pooled: Tensor | None) -> Tensor:
    """(captions, width): the scale of the first block's norm of text rows, at a noise level."""
    assert pooled is not None
    weight = next(iter(backbone.text_projections().values())).weight
    sigma = backbone.timesteps_at(torch.full((len(pooled),), level)).to(weight.device) * 1000
    given = [sigma, pooled.to(weight)]
    if getattr(network.config, "guidance_embeds", False):
        given.insert(1, torch.full_like(sigma, backbone.sampler.guidance_scale * 1000))
    made: Tensor = block.norm1_context.linear(nn.functional.silu(network.time_text_embed(*given)))
    if made.shape[1] == 2 * len(weight):  # the only block of a network: scale, shift
        return made.chunk(2, dim=1)[0]
    return made.chunk(6, dim=1)[1]  # shift, scale, ...


@contextmanager
def _ready(block: nn.Module) -> Iterator[None]:
    """Runs hooks that bring an offloaded block's weights, although the block itself is not called."""
    before = list(block._forward_pre_hooks.values())
    for hook in before:
        hook(block, ())
    try:
        yield
    finally:
        for hook in block._forward_hooks.values():
            hook(block, (), None)


def _all(backbone: Backbone, network: nn.Module, read: Read) -> Iterator[Tensor]:
    """One factor for each projection of every block."""
    names = [
        name
        for name, _ in network.named_modules()
        if name.endswith(tuple(f"attn.{end}" for end in READERS[read]))
        or (name.startswith("single_") and name.endswith(tuple(f"attn.{end}" for end in SINGLE[read])))
    ]
    width = backbone.width
    grams = {name: torch.zeros(width, width, dtype=torch.float64) for name in names}
    texts = backbone.encode(list(CAPTIONS))
    device = next(iter(backbone.text_projections().values())).weight.device
    count, length = texts.states.shape[:2]
    sides = (side // backbone.pixels_per_latent for side in (backbone.sampler.height, backbone.sampler.width))
    shape = (backbone.latent_channels, *sides)
    generator = Generator().manual_seed(0)
    for level in LEVELS:
        for caption in range(count):
            states = texts.states[caption : caption + 1].to(device).requires_grad_(True)
            pooled = None if texts.pooled is None else texts.pooled[caption : caption + 1].to(device)
            z = torch.randn(1, *shape, generator=generator).to(device)
            sigma = backbone.timesteps_at(torch.tensor([level])).to(device)
            with torch.enable_grad(), _kept(network, names, length) as seen:
                backbone.predict_noise(z, sigma, states, pooled)
                for name in names:
                    for _ in range(PROBES):
                        probe = torch.randn(seen[name].shape, generator=generator).to(seen[name])
                        (pulled,) = torch.autograd.grad(seen[name], [states], probe, retain_graph=True)
                        rows = pulled[0, texts.varying()].double().cpu()
                        grams[name] += rows.T @ rows
    for gram in grams.values():
        yield _factor(gram)


@contextmanager
def _kept(network: nn.Module, names: list[str], length: int) -> Iterator[dict[str, Tensor]]:
    """{name: output (1, T, n) of the layer for the text's rows} of a pass inside this context."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = output[:, :length]

        return hook

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _factor(gram: Tensor) -> Tensor:
    """F (D, D) with F^T F = gram, symmetric and positive semidefinite."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    result: Tensor = values.clamp(min=0).sqrt()[:, None] * vectors.T
    return result
