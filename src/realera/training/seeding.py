"""Random generators that depend only on the seed and a purpose, not on numbers that were drawn before."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Generator


def stream(seed: int, *purpose: str | int) -> Generator:
    """A CPU generator for one purpose, such as ("latents", step, rank). The same arguments give the same numbers in
    every process and on every device, so training can resume without saving the state of a generator."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
