"""Tools for training the miniature: a resumable, seeded loop, a weight average, and fast layers for CPUs."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from realera.system.disk import atomic

Log = Callable[[str], None]


class FloatGroupNorm(nn.GroupNorm):
    """GroupNorm in float32 under autocast: bf16 GroupNorm on channels-last tensors is 3-5 times slower on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


def fast_norms(model: nn.Module) -> None:
    """Replaces the model's GroupNorm layers by FloatGroupNorm (same weights, same state dict)."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = FloatGroupNorm


class Average:
    """Exponential moving average of a module's parameters and buffers; the decay warms up as (1 + n) / (10 + n)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for mean, now in zip(self.module.parameters(), module.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
        for held, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            held.copy_(buffer)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    model: nn.Module,
    loss: Callable[[np.random.Generator, torch.Generator], Tensor],
    checkpoint: Path,
    steps: int,
    lr: float,
    seed: int,
    log: Log,
    warmup: int = 100,
    weight_decay: float = 0.01,
    decay: float = 0.999,
    clip: float = 1.0,
    save_every: float = 120.0,
    probe: Callable[[nn.Module, int], str] | None = None,
    probe_every: int = 1000,
) -> nn.Module:
    """Minimises loss(numpy rng, torch rng) with AdamW; returns the averaged model.

    Both generators are seeded with (seed, step), and the whole state is saved every `save_every` seconds, so a stopped
    run resumes and ends with the same result.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    average, start = Average(model, decay), 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        average.count, start = state["count"], state["step"]
        log(f"resumed at step {start}")
    began = saved = time.monotonic()
    running = 0.0
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * cosine(step, steps, warmup)
        value = loss(np.random.default_rng((seed, step)), torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        average.update(model)
        running = float(value.detach()) if step == start else 0.98 * running + 0.02 * float(value.detach())
        done = step + 1
        if done % 100 == 0 or done == steps:
            pace = (time.monotonic() - began) / (done - start)
            log(
                f"step {done}/{steps}  loss {running:.4f}  {pace:.3f} s/step  {pace * (steps - done) / 60:.1f} min left"
            )
        if probe and (done % probe_every == 0 or done == steps):
            log(probe(average.module, done))
        if time.monotonic() - saved > save_every or done == steps:
            save(checkpoint, model=model, average=average, optimiser=optimiser, step=done)
            saved = time.monotonic()
    return average.module


def save(checkpoint: Path, model: nn.Module, average: Average, optimiser: Any, step: int) -> None:
    """Saves the state that `fit` needs to resume, completely or not at all."""
    state = {
        "model": model.state_dict(),
        "average": average.module.state_dict(),
        "optimiser": optimiser.state_dict(),
        "count": average.count,
        "step": step,
    }
    with atomic(checkpoint) as beside:
        torch.save(state, beside)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, 32, 32, 3) uint8 -> (B, 3, 32, 32) float32 in [-1, 1], channels last in memory."""
    batch = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def record(report: Path, **values: Any) -> None:
    """Adds measured values to a JSON report."""
    held = json.loads(report.read_text()) if report.is_file() else {}
    with atomic(report) as beside:
        beside.write_text(json.dumps({**held, **values}, indent=1, sort_keys=True))
