"""Prompts that are longer than the text encoder reads: one warning with a count, before anything heavy is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from realera.runs import preflight

log = logging.getLogger("realera")
ENDS = 2  # the tokens that begin and end every text


class Lengths:
    """Counts texts and those of them that are cut. Knows nothing where the tokenizer is not on this disk yet."""

    def __init__(self, backbone: Mapping[str, Any]) -> None:
        rows = backbone.get("text_length") or (backbone.get("text") or {}).get("max_length")
        self.tokenizer = preflight.tokenizer_of(backbone) if rows else None
        self.fits = int(rows or 0) - ENDS  # tokens of a text
        self.texts = self.cut = 0
        self.example = ""

    def add(self, text: str) -> bool:
        """Counts the text; whether it is cut."""
        self.texts += 1
        # A token has a byte or more: most texts need not be tokenized to see that they fit.
        if self.tokenizer is None or len(text.encode(errors="replace")) <= self.fits:
            return False
        cut = len(self.tokenizer.encode(text, add_special_tokens=False).ids) > self.fits
        if cut:
            self.cut += 1
            self.example = self.example or text
        return cut

    def said(self, what: str = "prompts") -> str:
        """The warning; "" where nothing is cut."""
        if not self.cut:
            return ""
        short = self.example if len(self.example) <= 60 else f"{self.example[:57]}..."
        return (
            f"{self.cut:,} of {self.texts:,} {what} are longer than the {self.fits} tokens that the text encoder "
            f"reads, and their ends are cut off, such as {short!r}"
        )


def warn(texts: Iterable[str], backbone: Mapping[str, Any], what: str = "prompts") -> None:
    """Logs one line if any of the texts, each counted once, is cut."""
    lengths = Lengths(backbone)
    for text in dict.fromkeys(texts):
        lengths.add(text)
    if said := lengths.said(what):
        log.warning("%s", said)
