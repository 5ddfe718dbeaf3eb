"""Further optional roles of a method's parts: what an aligner trains, and what a part costs. contracts.py has all
others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from realera.contracts import Concept, EraserSpec, Network


@runtime_checkable
class TrainsNetwork(Protocol):
    """An aligner whose `parameters` or `lora` belong to this network, and not to the denoiser. A constant of its class,
    because the settings are checked before the class is imported."""

    network: Network


@runtime_checkable
class TrainsErasers(Protocol):
    """An aligner that trains erasers. Its `lora` is None and its `parameters` are ()."""

    eraser: EraserSpec


@runtime_checkable
class TakesSeed(Protocol):
    """An editor that draws at random. It gets the run's seed before its first call."""

    def take_seed(self, seed: int) -> None: ...


class Planned(Protocol):
    """A part that tells its cost before it is built, for estimates and sweep plans. Both methods are optional, for a
    part at any depth of a method's settings. settings: the part's own node. steps: steps of the backbone's sampler."""

    @staticmethod
    def passes(settings: Mapping[str, Any], steps: int) -> float:
        """Denoiser passes of a training step: for each latent if the part is an aligner (default: `PASSES_OF_A_STEP`),
        for the whole batch if it is a latent source (default: 0)."""
        ...

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> Mapping[str, float]:
        """{name: denoiser passes} of everything that the part makes and caches before the first step. A name begins
        with its kind ("images field"). Parts with equal settings and names share the result: it is made once."""
        ...
