"""Counts prompts that are longer than the text encoder reads, and warns once, before torch is imported."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from realera.contracts import Task
from realera.runs import preflight
from realera.settings.run_settings import BackboneSettings

log = logging.getLogger("realera")
ENDS = 2  # the start and end tokens of every text


class Lengths:
    """Counts texts, and how many are cut. Without the tokenizer on this machine, no text counts as cut."""

    def __init__(self, backbone: BackboneSettings) -> None:
        rows = backbone.token_rows
        self.tokenizer = preflight.tokenizer_of(backbone) if rows else None
        self.fits = int(rows or 0) - ENDS  # most tokens of a text
        self.texts = self.cut = 0
        self.example = ""

    def add(self, text: str) -> bool:
        """Counts the text. Returns whether it is cut."""
        self.texts += 1
        # A token has at least one byte, so most texts are seen to fit without tokenizing.
        if self.tokenizer is None or len(text.encode(errors="replace")) <= self.fits:
            return False
        cut = len(self.tokenizer.encode(text, add_special_tokens=False).ids) > self.fits
        if cut:
            self.cut += 1
            self.example = self.example or text
        return cut

    def said(self, what: str = "prompts") -> str:
        """The warning; "" if no text is cut."""
        if not self.cut:
            return ""
        short = self.example if len(self.example) <= 60 else f"{self.example[:57]}..."
        return (
            f"{self.cut:,} of {self.texts:,} {what} are longer than the {self.fits} tokens that the text encoder "
            f"reads, so their ends are cut off, such as {short!r}"
        )


def warn_of_task(task: Task, backbone: BackboneSettings) -> None:
    """`warn` for the prompts that a task's images are drawn from."""
    warn((prompt.text for prompt in task.eval_prompts()), backbone, "evaluation prompts")


def warn(texts: Iterable[str], backbone: BackboneSettings, what: str = "prompts") -> None:
    """Logs one line if any text is cut. Repeated texts are counted once."""
    lengths = Lengths(backbone)
    for text in dict.fromkeys(texts):
        lengths.add(text)
    if said := lengths.said(what):
        log.warning("%s", said)


def remark(text: str, backbone: BackboneSettings) -> str:
    """A remark for a page about one prompt; "" if all of it is read."""
    counted = Lengths(backbone)
    return f"only the first {counted.fits} tokens of this prompt are used" if counted.add(text) else ""
