"""Bayesian bootstrap (Rubin, 1981) over images and runs: each unit (an image or a run) has one random weight in each
resample. The weight depends only on the seed and the unit's key, not on the run or system (as for crossed data: Owen &
Eckles, 2012). So systems with common units are compared in pairs, and an image that is in ten runs is one image. No
weight is 0, so a metric with a scored image has a mean in every resample.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from realera.contracts import Prompt

DRAWS, LEVEL = 2000, 95.0  # number of resamples; percent of them that lie inside an interval
TAIL = (1 - LEVEL / 100) / 2
KIND = "Bayesian bootstrap over {}; exact (Clopper-Pearson) where all images are read alike as yes or no"
PIECE, KEPT = 4096, 32_768  # units processed at once; units whose weights stay in memory (16 KB each; COCO-30K fits)


def image_key(prompt: Prompt) -> str:
    """Identifies an image by its split, concept, text and seed, in all runs and systems."""
    return "\x1f".join(("image", prompt.split, prompt.concept, prompt.text, str(prompt.seed)))


def run_key(concept: str, seed: int) -> str:
    return "\x1f".join(("run", concept, str(seed)))


def concept_key(concept: str) -> str:
    return "\x1f".join(("concept", concept))


class Resamples:
    """`draws` resamples from one seed. The object caches weights: sharing it for a whole table saves time and does not
    change the numbers."""

    def __init__(self, seed: int = 0, draws: int = DRAWS) -> None:
        self.seed = seed
        self.draws = draws
        self._known: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def weights(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Weights (len(keys), draws) float64, exponential with mean 1, and their sum (draws,). Equal keys have equal
        rows."""
        keys = tuple(keys)
        if keys not in self._known:
            if sum(map(len, self._known)) + len(keys) > KEPT:
                self._known.clear()
            uniform = torch.empty(len(keys), self.draws, dtype=torch.float64)
            for row, key in zip(uniform, keys):
                digest = hashlib.sha256(f"{self.seed}\x1f{key}".encode()).digest()
                generator = Generator().manual_seed(int.from_bytes(digest[:4], "big"))
                torch.rand(self.draws, generator=generator, out=row)
            weights = -torch.log1p(-uniform)
            self._known[keys] = weights, weights.sum(dim=0)
        return self._known[keys]

    def deviations(self, keys: Sequence[str], values: Tensor) -> Tensor:
        """(draws,): the weighted mean of values (n,) minus their mean. NaN values are left out. 0 for fewer than two
        values.

        The result is scaled by sqrt((n + 1) / (n - 1)): with these weights the mean of n values has the variance
        sum (x - mean)^2 / (n (n + 1)), and the unbiased one has (n - 1) in place of (n + 1).
        """
        scored = ~values.isnan()
        n = int(scored.sum())
        if n < 2:
            return torch.zeros(self.draws, dtype=torch.float64)
        apart = torch.where(scored, values - values[scored].mean(), 0).double()
        total, weight = torch.zeros(2, self.draws, dtype=torch.float64)
        for start in range(0, len(keys), PIECE):
            here = slice(start, start + PIECE)
            w, whole = self.weights(keys[here])
            total += apart[here] @ w
            weight += whole if bool(scored[here].all()) else scored[here].double() @ w
        result: Tensor = total / weight * math.sqrt((n + 1) / (n - 1))
        return result


def interval(values: Tensor) -> tuple[float, float]:
    """The interval that contains LEVEL percent of the resampled values; NaN if any value is NaN."""
    if values.isnan().any():
        return math.nan, math.nan
    low, high = torch.quantile(values, torch.tensor([TAIL, 1 - TAIL], dtype=values.dtype)).tolist()
    return low, high


def exact(value: float, trials: float) -> tuple[float, float]:
    """The Clopper-Pearson (1934) interval, in percent, of a share of `trials` images that is 0 or 100 percent."""
    bound = 100 * (1 - TAIL ** (1 / trials))
    return (0.0, bound) if value < 50 else (100 - bound, 100.0)


def described(over: str, resamples: Resamples) -> Mapping[str, object]:
    """The description of the intervals in a file of numbers. over: the resampled units, in words."""
    return {"kind": KIND.format(over), "level": LEVEL, "draws": resamples.draws, "seed": resamples.seed}
