"""Noisy latents by roll-out: images of a concept, drawn partway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Generator, Tensor

from realera.contracts import Backbone, Pair, Sampler, Scheduler, TextStates, UserError
from realera.methods.latents import FIRST_SEED, TIMESTEPS, at_level
from realera.methods.texts import take
from realera.setting_types import Batch, Count, Guidance, Number, SamplerSteps

ExtraSteps = Annotated[int, Number(0, 1000, whole=True)]
Model = Literal["trained", "original"]
Text = Literal["concept", "anchor", "concept_prompts", "anchor_prompts"]
Law = Literal["bin", "level", "list"]


class Rollout:
    """z_t is an image after k of the sampler's steps, k uniform in first_stop ... steps - 1.

    model: the model that draws, "trained" = the model in training, or "original". text: the prompt: the bare name of
    the concept or of its anchor, or one of their training prompts at random. scheduler, steps, guidance_scale: of the
    sampler; sizes are the backbone's. batch: z_t per step.

    timestep: the t that the loss uses, in levels of 0 ... 999. "bin": uniform in the k-th of `steps` equal parts
    of them, which begins at about the noise level of z_t (ESD); "level": that noise level; "list": entry 1000 k / steps
    of 999 ... 0 (SPM's code). extra_steps: number of steps that the sampler goes beyond t (ESD's code: 2).

    renew: a concept's images are drawn anew every `renew` steps. 1: each step draws its own `batch` images together (as
    in the papers), up to the largest k. More: `chains` images are drawn to the end and all their stages are kept; a
    step takes `batch` of the stages at random. The distribution of (image, k, t) is the same, but these steps share
    images, which come from a model that is up to renew - 1 steps older. A run's checkpoint contains the stages.

    Raises UserError if first_stop is not one of the steps.
    """

    def __init__(
        self,
        scheduler: Scheduler = "ddim",
        steps: SamplerSteps = 50,
        guidance_scale: Guidance = 3.0,
        model: Model = "trained",
        text: Text = "concept",
        timestep: Law = "bin",
        extra_steps: ExtraSteps = 0,
        first_stop: ExtraSteps = 0,
        batch: Batch = 1,
        renew: Count = 1,
        chains: Batch = 8,
    ) -> None:
        if first_stop >= steps:
            raise UserError(
                f"method.latents.first_stop={first_stop} is not a sampler step: give a number from 0 to {steps - 1}."
            )
        self.settings: dict[str, Any] = {
            "scheduler": scheduler,
            "steps": steps,
            "guidance_scale": float(guidance_scale),
        }
        self.steps, self.batch, self.renew, self.chains = steps, batch, renew, chains
        self.extra_steps, self.first_stop = extra_steps, first_stop
        self.original, self.text, self.timestep = model == "original", text, timestep
        self.texts: list[TextStates] = []  # of each concept
        self.stages: dict[int, Tensor] = {}  # (steps + 1, chains, C, h, w) of each concept, if renew > 1
        self.uses: dict[int, int] = {}
        self.size: tuple[int, ...] = ()  # (C, h, w)
        self.prompts: dict[int, Tensor] = {}  # (chains,) of each concept, the text that each chain was drawn from

    @staticmethod
    def passes(settings: Mapping[str, Any], steps: int) -> float:
        """Denoiser passes per step: on average half of each image, or whole images every `renew` steps, with
        guidance."""
        own, renew = int(settings.get("steps") or steps), int(settings.get("renew") or 0)
        if renew > 1:
            return 2.0 * own * int(settings.get("chains") or 1) / renew
        return float(own) * int(settings.get("batch") or 1) if renew else 0.0

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        name, _, prompts = self.text.partition("_")
        self.stages, self.uses = {}, {}
        sides = (side // backbone.pixels_per_latent for side in (backbone.sampler.height, backbone.sampler.width))
        self.size = backbone.latent_channels, *sides
        if prompts:
            self.texts = [pair.target if name == "concept" else pair.anchor for pair in pairs]
        else:
            named = [pair.concept.target if name == "concept" else pair.concept.anchor for pair in pairs]
            self.texts = [backbone.encode([text]) for text in named]

    def __call__(self, backbone: Backbone, concept: int, generator: Generator) -> Any:
        """(z_t (batch, C, h, w), t (batch,)) of one concept."""
        return self.with_prompts(backbone, concept, generator)[:2]

    def with_prompts(self, backbone: Backbone, concept: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """As a call, and (batch,): the index of the text that each image was drawn from."""
        stops = torch.randint(self.first_stop, self.steps, (self.batch,), generator=generator)
        timesteps = self.timesteps_of(backbone, stops, generator)
        stops = (stops + self.extra_steps).clamp(max=self.steps)
        if self.renew == 1:
            chains = torch.arange(self.batch)
            stages, prompts = self._drawn(backbone, concept, self.batch, sorted(set(stops.tolist())), generator)
            latents = torch.stack([stages[stop][chain] for stop, chain in zip(stops.tolist(), chains.tolist())])
        else:
            if self.uses.get(concept, 0) % self.renew == 0:
                drawn, self.prompts[concept] = self._drawn(
                    backbone, concept, self.chains, range(self.steps + 1), generator
                )
                self.stages[concept] = torch.stack(list(drawn.values()))
            self.uses[concept] = self.uses.get(concept, 0) + 1
            chains = torch.randint(self.chains, (self.batch,), generator=generator)
            latents = self.stages[concept][stops, chains]
            prompts = self.prompts[concept][chains] if concept in self.prompts else torch.zeros_like(chains)
        device = next(backbone.denoiser.parameters()).device
        return latents.to(device), timesteps.to(device), prompts

    def all_stages(self, backbone: Backbone, kind: int, numbers: Tensor, generator: Generator) -> Tensor:
        """(steps + 1, images, C, h, w): all stages of the images `numbers` (images,) of a text source. Image i is drawn
        from text i mod their number."""
        prompts = numbers % len(self.texts[kind].states)
        return torch.stack(list(self._stages(backbone, kind, prompts, range(self.steps + 1), generator).values()))

    def state_dict(self) -> dict[str, Tensor]:
        """The kept stages. They cannot be drawn again, because the model has changed since."""
        return {str(concept): stages.cpu() for concept, stages in self.stages.items()}

    def state_form(self, calls: Sequence[int]) -> dict[str, tuple[int, ...]]:
        form = self.steps + 1, self.chains, *self.size
        return {str(concept): form for concept, count in enumerate(calls) if count and self.renew > 1}

    def load_state_dict(self, state: Mapping[str, Tensor], calls: Sequence[int]) -> None:
        self.stages = {int(concept): stages for concept, stages in state.items()}
        self.uses = {concept: calls[concept] for concept in self.stages}

    def timesteps_of(self, backbone: Backbone, stops: Tensor, generator: Generator) -> Tensor:
        if self.timestep == "level":
            return backbone.timesteps(self._sampler(backbone))[stops]
        if self.timestep == "list":
            return at_level(backbone, TIMESTEPS - 1 - stops * TIMESTEPS // self.steps)
        first = (self.steps - 1 - stops) * TIMESTEPS / self.steps
        low, high = first.round(), (first + TIMESTEPS / self.steps).round()
        return at_level(backbone, (low + torch.rand(len(stops), generator=generator) * (high - low)).floor())

    def _drawn(
        self, backbone: Backbone, concept: int, count: int, stops: Sequence[int], generator: Generator
    ) -> tuple[dict[int, Tensor], Tensor]:
        """`_stages` of `count` images, each of a random text, and the text (count,) of each."""
        prompts = torch.randint(len(self.texts[concept].states), (count,), generator=generator)
        return self._stages(backbone, concept, prompts, stops, generator), prompts

    def _stages(
        self, backbone: Backbone, concept: int, prompts: Tensor, stops: Sequence[int], generator: Generator
    ) -> dict[int, Tensor]:
        """{k: latents (count, C, h, w) after k steps} of images of the texts `prompts` (count,), drawn up to the last
        of `stops`."""
        texts = take(self.texts[concept], prompts)
        seeds = torch.randint(FIRST_SEED, 2**62, (len(prompts),), generator=generator).tolist()
        recorder = _Recorder(stops[:-1]) if len(stops) > 1 else None
        with backbone.original() if self.original else nullcontext():
            last = backbone.sample(texts, seeds, self._sampler(backbone), recorder, stop_at=stops[-1])
        return {**(recorder.latents if recorder is not None else {}), stops[-1]: last}

    def _sampler(self, backbone: Backbone) -> Sampler:
        return replace(backbone.sampler, **self.settings)


class _Recorder:
    """`contracts.Guide`: plain guidance that records the latents before each of `steps`."""

    prompts: Sequence[str] = ()

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps
        self.latents: dict[int, Tensor] = {}

    @contextmanager
    def around(self, backbone: Backbone, texts: Sequence[str]) -> Iterator[None]:
        yield

    def __call__(
        self, uncond: Tensor, cond: Tensor, beside: Tensor, latents: Tensor, step: int, guidance_scale: float
    ) -> Tensor:
        if step in self.steps:
            self.latents[step] = latents
        return uncond + guidance_scale * (cond - uncond)
