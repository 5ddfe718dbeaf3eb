"""Prompts and their encoded states: records of `contracts`, as those in `records`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt and the position of a concept's name in it, text[start:end]. The position comes from the template's
    slot. Searching for the name would be wrong: "a famous art by art" contains it twice."""

    text: str
    start: int
    end: int

    @classmethod
    def of(cls, template: str, name: str) -> NamedPrompt:
        """Replaces the first {} of `template` with `name`."""
        before, _, after = template.partition("{}")
        return cls(before + name + after, len(before), len(before) + len(name))

    @property
    def name(self) -> str:
        return self.text[self.start : self.end]


@dataclass(frozen=True)
class EncoderRows:
    """The rows start ... stop - 1 of one text encoder in `TextStates.states`. first, last, end (B,) int64: as first,
    last and length of `TextStates`, counted from row 0 of all states. begins: number of rows at its start that are
    equal for all texts (BOS: 1; T5 has none; rows that are zeros because their encoder is left out: all)."""

    start: int
    stop: int
    first: Tensor
    last: Tensor
    end: Tensor
    begins: int


@dataclass(frozen=True)
class TextStates:
    """Encoded prompts, as the denoiser reads them.

    states (B, T, D) float32: in SD 1.x and 2.x after the final norm, in SDXL the states of two encoders side by side,
    in SD 3 those of two CLIP encoders side by side (77 rows) and below them those of T5, in FLUX those of T5.
    first, last (B,) int64: rows of the first and last sub-token of a `NamedPrompt`'s name; -1 for a plain text.
    length (B,): row of the first EOS. pooled (B, E) if the denoiser takes one (SDXL, SD 3, FLUX), else None.
    parts (B, encoders, 5) int64: the fields start, first, last, end and begins of `EncoderRows`, if the rows are those
    of several encoders, or of one without a begin row; None = one encoder with one begin row.
    """

    states: Tensor
    first: Tensor
    last: Tensor
    length: Tensor
    pooled: Tensor | None = None
    parts: Tensor | None = None

    def encoders(self) -> list[EncoderRows]:
        """The rows of each text encoder, from the first to the last; those of the first have `first`, `last`,
        `length`."""
        rows = int(self.states.shape[1])
        if self.parts is None:
            return [EncoderRows(0, rows, self.first, self.last, self.length, 1)]
        if not len(self.parts):
            return []
        starts = [*self.parts[0, :, 0].tolist(), rows]
        return [
            EncoderRows(start, stop, part[:, 1], part[:, 2], part[:, 3], int(part[0, 4]))
            for part, (start, stop) in zip(self.parts.unbind(1), pairwise(starts))
        ]

    def varying(self) -> list[int]:
        """The rows that differ between texts: all but the begin rows."""
        return [row for part in self.encoders() for row in range(part.start + part.begins, part.stop)]

    def constant(self) -> list[int]:
        """The begin rows, which are equal for all texts."""
        return [row for part in self.encoders() for row in range(part.start, part.start + part.begins)]
