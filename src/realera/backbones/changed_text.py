"""The text encoders of a backbone as a network that can be trained: which weights were changed, and their originals.

A name is "<folder>.<path>", "text_encoder.encoder.layers.0.mlp.fc1.weight", without the "text_model." that some classes
and versions of transformers put before the path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from realera.backbones import adapters
from realera.backbones.base import BaseWeights

FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
INNER = ".text_model."


class ChangedText:
    """network: the text encoders, each named as its folder. state: which weights are in use, for caches of text states:
    "loaded", "changed", "changed without adapter", or None: they are trained, and no state may be kept."""

    def __init__(self, models: Sequence[nn.Module], backbone: str) -> None:
        self.backbone = backbone
        self.network = nn.ModuleDict(dict(zip(FOLDERS, models)))
        self.network.training = False  # as a loaded model; the encoders keep their own mode
        self.base = BaseWeights(self.network, backbone, named=plain)
        self._inside = ""  # the state inside `original`

    @property
    def state(self) -> str | None:
        if self._inside == "loaded" or not self.is_changed:
            return "loaded"
        if any(parameter.requires_grad for parameter in self.network.parameters()):
            return None
        return self._inside or "changed"

    @property
    def is_changed(self) -> bool:
        """Whether weights may differ from the original ones, or there is an adapter."""
        return bool(self.base.first) or bool(adapters.layers(self.network))

    @contextmanager
    def original(self, edited: bool) -> Iterator[None]:
        """The text encoders as loaded. edited: with their changed weights and without an adapter."""
        if not self.is_changed:
            yield
            return
        self._inside = "changed without adapter" if edited else "loaded"
        try:
            with adapters.disabled(self.network), nullcontext() if edited else self.base.swapped():
                yield
        finally:
            self._inside = ""

    def fingerprint(self, loaded: str) -> str:
        """Content id of the text encoders as they are now; `loaded` if they are as loaded."""
        if self.state == "loaded":
            return loaded
        now = {**self.base.changed(), **self.adapter_state()}
        if not now:
            return loaded
        digest = hashlib.sha256(loaded.encode())
        for name, value in sorted(now.items()):
            digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `tensors` whose names are a text encoder's."""
        heads = tuple(f"{folder}." for folder in FOLDERS)
        return {name: value for name, value in tensors.items() if name.startswith(heads)}

    def adapter_state(self) -> dict[str, Tensor]:
        return {plain(name): value for name, value in adapters.state(self.network).items()}

    def load_adapter(self, saved: Mapping[str, Tensor]) -> None:
        actual = {plain(name): name for name, _ in self.network.named_modules()}
        renamed = {}
        for name, value in saved.items():
            layer, _, part = name.rpartition(".")
            renamed[f"{actual.get(layer, layer)}.{part}"] = value
        adapters.load(self.network, renamed, self.backbone)


def plain(name: str) -> str:
    """A name without "text_model."."""
    return name.replace(INNER, ".", 1)
