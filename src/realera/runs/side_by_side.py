"""Draws the same prompt and seeds with the original model and with the erased models of several runs, one after the
other, in one copy of the base model. This module imports torch, so commands import it late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, Protocol

import torch

from realera.contracts import Guide, UserError
from realera.evaluation.generate import out_of_memory
from realera.runs import prompt_lengths, steps, together
from realera.runs.folders import Run
from realera.settings.instantiate import build
from realera.training.checkpoint import read_erased

EachStep = Callable[[int, int], None]
"""(number of finished steps, of all models together; their total). An exception in it ends the drawing."""


class Wish(Protocol):
    """The settings of one drawing. negative: "" for none. methods: names of `SideBySide.runs`."""

    @property
    def prompt(self) -> str: ...
    @property
    def negative(self) -> str: ...
    @property
    def methods(self) -> Sequence[str]: ...
    @property
    def seeds(self) -> Sequence[int]: ...
    @property
    def steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...


class SideBySide:
    """The models of several runs. Only one thread draws at a time; the others wait.

    Raises:
        UserError: the weights of a run are missing or torn, or were made with other base weights than the first run's.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = dict(zip(together.names_of(runs), runs))
        self.backbone = steps.load_backbone(runs[0].config)
        self.at_once = int(runs[0].config["images_at_once"])
        self._erased = {}
        for name, run in self.runs.items():
            erased = read_erased(run.erased)
            if erased.origin.fingerprint != self.backbone.fingerprint:
                raise together.other_base(run, runs[0])
            self._erased[name] = erased.state
        self._loaded: str | None = None  # the run whose weights the backbone has
        self._turn = Lock()

    def about(self) -> dict[str, Any]:
        """What a page says about the models: `together.texts`, their names, the sampler's steps and guidance, and a
        function that returns a remark about a prompt."""
        first = next(iter(self.runs.values()))
        return {
            **together.texts(list(self.runs.values())),
            "models": [together.ORIGINAL, *self.runs],
            "steps": self.backbone.sampler.steps,
            "guidance": self.backbone.sampler.guidance_scale,
            "note": lambda prompt: prompt_lengths.remark(prompt, first.settings.backbone),
        }

    def draw(self, wish: Wish, each_step: EachStep = lambda done, total: None) -> Iterator[tuple[str, list[Any]]]:
        """Yields (name, one uint8 (H, W, 3) array for each seed) of the original model, and then of each of the wish's
        methods. All start from the same noise.

        Raises:
            UserError: a setting cannot be used, or the images do not fit into the memory.
        """
        sampler = replace(self.backbone.sampler, steps=wish.steps, guidance_scale=wish.guidance)
        parts = [wish.seeds[start : start + self.at_once] for start in range(0, len(wish.seeds), self.at_once)]
        total = sampler.steps * len(parts) * (1 + len(wish.methods))
        done = 0

        def count(step: int) -> None:
            nonlocal done
            each_step(done, total)
            done += 1

        def pictures(guide: Guide | None = None) -> list[Any]:
            found: list[Any] = []
            for part in parts:
                texts = [wish.prompt] * len(part)
                drawn = self.backbone.generate(texts, part, sampler, guide, wish.negative, count)
                found.extend(drawn.cpu().numpy())
            return found

        with self._turn, _memory_explained(len(wish.seeds)):
            with self.backbone.original():
                drawn = pictures()
            yield together.ORIGINAL, drawn
            for name in wish.methods:
                self._load(name)
                yield name, pictures(self._guide(name, sampler.steps))

    def _load(self, name: str) -> None:
        if self._loaded != name:
            self._loaded = None  # if the weights cannot be loaded, the backbone has no run's
            self.backbone.load_erased(self._erased[name])
            self._loaded = name

    def _guide(self, name: str, sampler_steps: int) -> Guide | None:
        """The guide of a run's method. A guide that counts in sampler steps gets the number that is drawn with."""
        node = self.runs[name].settings.method.guide.node
        if not node:
            return None
        guide: Guide = build({**node, "steps": sampler_steps} if "steps" in node else node)
        return guide


class _memory_explained:
    """Inside this context, an error about full memory becomes a sentence. images: the number that is drawn at once."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            less = "draw fewer images at once" if self.images > 1 else "stop other programs that use the memory"
            raise UserError(f"the memory of the device is full: {less}.") from None
