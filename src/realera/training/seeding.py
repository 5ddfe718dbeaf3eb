"""Random numbers that depend on what they are for and on nothing that was drawn before."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Generator


def stream(seed: int, *purpose: str | int) -> Generator:
    """A CPU generator for one purpose, such as ("latents", step, rank). The same arguments give the same numbers in
    every process and on every device, so a loop that was stopped goes on without having saved a generator's state."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
