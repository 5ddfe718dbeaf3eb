"""The erased system as an attack sees it: `attack_contract.Attacked` and `Case`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from realera import paths
from realera.attack_contract import Attempt, Case
from realera.contracts import (
    Backbone,
    Concept,
    Course,
    Guide,
    GuidesStates,
    Judge,
    Mode,
    NamedPrompt,
    Prompt,
    Sampler,
    TextStates,
    UserError,
    Verdict,
)
from realera.evaluation.generate import sampler_of
from realera.evaluation.measures import shows
from realera.files.pictures import read_picture
from realera.methods.latents import drawn
from realera.system import disk


@dataclass(frozen=True)
class System:
    """A model as it is deployed, and its judge. at_once: images drawn in one batch. seed: of the attack."""

    backbone: Backbone
    guide: Guide | None
    judge: Judge
    mode: Mode
    at_once: int
    seed: int

    @property
    def device(self) -> torch.device:
        return next(self.backbone.denoiser.parameters()).device

    def acting(self, texts: Sequence[str], states: TextStates | None = None) -> AbstractContextManager[None]:
        if self.guide is None:
            return nullcontext()
        if states is not None and isinstance(self.guide, GuidesStates):
            return self.guide.around_states(self.backbone, states, texts)
        return self.guide.around(self.backbone, texts)

    def shows(self, prompt: Prompt, verdict: Verdict) -> bool:
        """`measures.shows` for this judge."""
        return shows(prompt, verdict, self.mode)


@dataclass
class AttackedConcept:
    """`attack_contract.Attacked`."""

    _system: System  # not the attack's: it has the judge
    concept: Concept
    prompts: Sequence[Prompt]
    names: Sequence[NamedPrompt]
    generator: Generator

    @property
    def backbone(self) -> Backbone:
        return self._system.backbone

    def latents(self, count: int, chunk: int = 8, texts: Sequence[str] | None = None) -> Tensor:
        with self.backbone.original():
            states = self.backbone.encode(self.names if texts is None else texts)
            title = f"Images of '{self.concept.target}'" if texts is None else "Images of other things"
            return drawn(self.backbone, states, count, chunk, None, paths.cache_dir(), self._system.seed, title)

    def acting(self, texts: Sequence[str], states: TextStates | None = None) -> AbstractContextManager[None]:
        return self._system.acting(texts, states)


@dataclass(frozen=True)
class Drawn:
    """An attempt with its image, uint8 (H, W, 3), and what the judge said."""

    attempt: Attempt
    step: int
    pixels: Tensor
    verdict: Verdict
    shown: bool


@dataclass
class AttackedPrompt(AttackedConcept):
    """`attack_contract.Case`. original: the file of the unedited model's image. scratch: the folder in which images are
    judged. best: the first attempt that shows the concept, else the last one. tried: (step, shown) of every attempt."""

    prompt: Prompt
    plain: bool
    searched: Mapping[str, Tensor]
    original: Path
    scratch: Path
    best: Drawn | None = None
    tried: list[tuple[int, bool]] = field(default_factory=list)

    @property
    def sampler(self) -> Sampler:
        return sampler_of(self.prompt, self.backbone.sampler)

    def image(self) -> Tensor:
        pixels = torch.from_numpy(np.array(read_picture(self.original)))
        return (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).to(self._system.device)

    def image_latents(self) -> Tensor:
        with torch.no_grad():
            return self.backbone.encode_images(self.image())

    def draw(
        self,
        attempts: Sequence[Attempt],
        step: int = 0,
        sampler: Sampler | None = None,
        course: Course | None = None,
    ) -> list[bool]:
        return self._draw([self] * len(attempts), attempts, step, sampler or self.sampler, course)

    def draw_all(self, cases: Sequence[Case], attempts: Sequence[Attempt], step: int = 0) -> list[bool]:
        own = [case for case in cases if isinstance(case, AttackedPrompt)]
        assert len(own) == len(cases) == len(attempts)
        return self._draw(own, attempts, step, self.sampler, None)

    def _draw(
        self,
        cases: Sequence[AttackedPrompt],
        attempts: Sequence[Attempt],
        step: int,
        sampler: Sampler,
        course: Course | None,
    ) -> list[bool]:
        size = self._system.at_once if course is None else max(1, len(attempts))
        shown = []
        for start in range(0, len(attempts), size):
            part, own = attempts[start : start + size], cases[start : start + size]
            pixels = self._pixels(part, own, sampler, course)
            verdicts = self._judged(pixels, [case.prompt for case in own])
            for case, attempt, one, verdict in zip(own, part, pixels, verdicts):
                found = self._system.shows(case.prompt, verdict)
                case.tried.append((step, found))
                shown.append(found)
                if case.best is None or not case.best.shown:
                    case.best = Drawn(attempt, step, one, verdict, found)
        return shown

    @torch.no_grad()
    def _pixels(
        self, attempts: Sequence[Attempt], cases: Sequence[AttackedPrompt], sampler: Sampler, course: Course | None
    ) -> Tensor:
        """uint8 (B, H, W, 3)."""
        read = [self._encoded(attempt) for attempt in attempts]
        states = stacked(read, self._system.device)
        seeds = [case.prompt.seed if attempt.seed is None else attempt.seed for case, attempt in zip(cases, attempts)]
        with self._system.acting([typed(attempt) for attempt in attempts], states):
            latents = self.backbone.sample(states, seeds, sampler, self._system.guide, course=course)
        return self.backbone.decode(latents).cpu()

    def _encoded(self, attempt: Attempt) -> TextStates:
        if attempt.states is not None:
            return attempt.states
        return self.backbone.encode([attempt.text], vectors=attempt.vectors)

    def _judged(self, pixels: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        with disk.temporary(self.scratch / "judged") as beside:
            beside.mkdir()
            files = [beside / f"{number:04d}.png" for number in range(len(pixels))]
            for file, one in zip(files, pixels):
                save_picture(file, one)
            verdicts = self._system.judge(files, prompts)
        if len(verdicts) != len(files):
            raise UserError(
                f"the judge {self._system.judge.name!r} must return one verdict per image: use another judge"
            )
        return verdicts


def save_picture(file: Path, pixels: Tensor) -> None:
    """Writes uint8 (H, W, 3) as PNG."""
    with disk.atomic(file) as beside:
        Image.fromarray(pixels.numpy()).save(beside, format="PNG")


def typed(attempt: Attempt) -> str:
    """The part of an attempt that is typed, which a guide compares with its concepts: without the name that vectors
    replace, and "" for states of no text."""
    if attempt.states is not None:
        return ""
    if isinstance(attempt.text, NamedPrompt):
        text = attempt.text
        return text.text if attempt.vectors is None else text.text[: text.start] + text.text[text.end :]
    return attempt.text


def stacked(read: Sequence[TextStates], device: torch.device) -> TextStates:
    """Several prompts as one batch."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(one, name).to(device) for one in read])

    pooled = None if read[0].pooled is None else joined("pooled")
    return replace(TextStates(joined("states"), joined("first"), joined("last"), joined("length")), pooled=pooled)
