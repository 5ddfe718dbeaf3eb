"""Relearning: the erased model's weights are fine-tuned, and its images tell after how many steps the concept is
back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from realera.attack_contract import Attacked, Attempt, Case
from realera.contracts import PASSES_OF_A_GRADIENT, Backbone, NamedPrompt, UserError
from realera.files.finite import NotFinite
from realera.methods.latents import noised
from realera.methods.texts import predict, take
from realera.setting_types import Batch, Count, Filled, Label, LearningRate, NonNegative, Rank, Targets, Template

Weights = Literal["lora", "full"]
Images = Literal["concept", "harmless"]
Steps = Annotated[Sequence[Count], Filled()]
Things = Annotated[Sequence[Label], Filled()]


class Relearning:
    """Minimises |noise - eps(z_t, t, prompt)|^2 over images that the original model draws, z_t their noised latents, by
    AdamW on the erased model, and draws the concept's prompts with the weights of each of `steps`.

    images: concept = images of the concept, with the task's training prompts | harmless = images of `things` alone,
    with `template`; things with a word of the concept's name are left out. count: of the images. weights: lora =
    adapters h = W x + B A x of this rank on the layers that end in one of `targets`, in addition to those that the
    erased model has; A is drawn from N(0, 1/rank^2), B is 0 | full = all weights of the denoiser, with the erased
    model's adapters as they are. batch: images of a step. lr, weight_decay: of AdamW; the gradient's norm is clipped to
    1.

    Settings as in diffusers' examples/text_to_image/train_text_to_image_lora.py. The trained weights of each step are
    kept in the run folder's attacks/<name>/. The model has its own weights again, bit for bit, after every image.

    Raises UserError for steps that do not rise, and for weights in half precision (see `check_dtype`).
    """

    counts_plain = False
    draws_all = True
    trains_adapters = True
    trains_weights_where: ClassVar = {"weights": "full"}

    def __init__(
        self,
        images: Images = "concept",
        count: Count = 8,
        weights: Weights = "lora",
        steps: Steps = (10, 50, 100, 500),
        rank: Rank = 4,
        targets: Targets = ("to_q", "to_k", "to_v", "to_out.0"),
        lr: LearningRate = 1e-4,
        weight_decay: NonNegative = 1e-2,
        batch: Batch = 4,
        chunk: Batch = 8,
        template: Template = "a photo of a {}",
        things: Things = ("dog",),
        together: Batch = 1,
    ) -> None:
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise UserError(f"attack.steps={list(steps)} must rise from one number to the next, such as [10,50,100].")
        self.images, self.count, self.full, self.steps = images, count, weights == "full", list(steps)
        self.rank, self.targets = rank, tuple(targets)
        self.lr, self.weight_decay, self.batch, self.chunk = lr, weight_decay, batch, chunk
        self.template, self.things = template, tuple(things)
        self.together = together

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return len(settings["steps"]) * per_image

    @staticmethod
    def passes_of_search(settings: Mapping[str, Any], per_image: float) -> float:
        training = PASSES_OF_A_GRADIENT * int(max(settings["steps"])) * int(settings["batch"])
        return training + int(settings["count"]) * per_image

    def __call__(self, case: Case) -> Mapping[str, Any]:
        return self.attack_together([case])[0]

    def attack_together(self, cases: Sequence[Case]) -> Sequence[Mapping[str, Any]]:
        backbone, searched = cases[0].backbone, cases[0].searched
        for step in self.steps:
            prefix = f"{step}/"
            tensors = {key.removeprefix(prefix): value for key, value in searched.items() if key.startswith(prefix)}
            with tuned(backbone, tensors) if self.full else adapted(backbone, tensors):
                cases[0].draw_all(cases, [Attempt(case.prompt.text) for case in cases], step=step)
        return [{} for _ in cases]

    def search(self, attacked: Attacked) -> dict[str, Tensor]:
        """{"<step>/<weight>": its value after this step}"""
        backbone = attacked.backbone
        check_dtype(backbone, self.full)
        prompts = self.prompts(attacked)
        latents = attacked.latents(self.count, self.chunk, None if self.images == "concept" else prompts)
        if self.full:
            start = {name: value.detach().clone() for name, value in own_weights(backbone.denoiser).items()}
            with tuned(backbone, start, trained=True):
                return self.trained(attacked, latents, prompts, own_weights(backbone.denoiser))
        start = new_adapters(backbone, self.targets, self.rank, attacked.generator)
        for value in start.values():
            value.requires_grad_()
        with adapted(backbone, start):
            return self.trained(attacked, latents, prompts, start)

    def prompts(self, attacked: Attacked) -> list[str]:
        """Image i is drawn with prompt i mod P."""
        if self.images == "concept":
            return [named.text for named in attacked.names]
        words = attacked.concept.target.casefold().split()
        things = [thing for thing in self.things if not set(words) & set(str(thing).casefold().split())]
        if not things:
            raise UserError("attack.things names the concept alone: add things that are harmless.")
        return [NamedPrompt.of(self.template, str(thing)).text for thing in things]

    def trained(
        self, attacked: Attacked, latents: Tensor, prompts: Sequence[str], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Trains `weights`, which are in use, and returns their values after each of `steps`, on the CPU."""
        backbone, generator = attacked.backbone, attacked.generator
        with torch.no_grad():
            encoded = backbone.encode(prompts)
        optimizer = torch.optim.AdamW(list(weights.values()), lr=self.lr, weight_decay=self.weight_decay)
        found: dict[str, Tensor] = {}
        for step in range(1, self.steps[-1] + 1):
            chosen = torch.randint(len(latents), (self.batch,), generator=generator)
            z_t, timesteps, noise = noised(backbone, latents, chosen, generator)
            rows = chosen % len(prompts)
            texts = take(encoded, rows)
            with torch.enable_grad(), attacked.acting([prompts[row] for row in rows.tolist()], texts):
                loss = (predict(backbone, z_t, timesteps, texts) - noise).square().mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            if not loss.isfinite():
                raise NotFinite(f"The loss of relearning is {loss.item()} at step {step}: lower attack.lr.")
            nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
            optimizer.step()
            if step in self.steps:
                found |= {f"{step}/{name}": value.detach().cpu().clone() for name, value in weights.items()}
        return found


def check_dtype(backbone: Backbone, full: bool) -> None:
    """Raises UserError for weights in half precision: in float16 gradients underflow, and in bfloat16 most steps on the
    weights themselves would be rounded away."""
    dtype = next(backbone.denoiser.parameters()).dtype
    if dtype == torch.float16 or (full and dtype != torch.float32):
        name = str(dtype).removeprefix("torch.")
        instead = "float32" if full else "bfloat16 or float32"
        raise UserError(f"Weights in {name} cannot be trained: set backbone.dtype={instead}.")


def own_weights(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The denoiser's weights without those of adapters."""
    return {name: value for name, value in denoiser.named_parameters() if ".lora_" not in name}


@contextmanager
def tuned(backbone: Backbone, values: Mapping[str, Tensor], trained: bool = False) -> Iterator[None]:
    """Inside this context the denoiser's own weights have these values. trained: they have gradients."""
    weights = own_weights(backbone.denoiser)
    kept = {name: (weights[name].data, weights[name].requires_grad) for name in values}
    try:
        for name, value in values.items():
            weights[name].data = value.to(weights[name].data, copy=True)
            weights[name].requires_grad_(trained)
        yield
    finally:
        for name, (data, flag) in kept.items():
            weights[name].data, weights[name].grad = data, None
            weights[name].requires_grad_(flag)


def new_adapters(backbone: Backbone, targets: Sequence[str], rank: int, generator: Generator) -> dict[str, Tensor]:
    """{"<layer>.down": (rank, in), "<layer>.up": (out, rank)} float32 for the linear layers that end in a target.
    Raises UserError if a target matches none."""
    layers = linear_layers(backbone.denoiser)
    found: dict[str, Tensor] = {}
    for target in targets:
        matched = {name: layer for name, layer in layers.items() if name == target or name.endswith(f".{target}")}
        if not matched:
            raise UserError(
                f"attack.targets: {target!r} matched 0 layers of backbone {backbone.name}; use names such as to_k."
            )
        for name, layer in matched.items():
            weight = layer.weight
            down = torch.randn(rank, weight.shape[1], generator=generator) / rank
            found[f"{name}.down"] = down.to(weight.device)
            found[f"{name}.up"] = torch.zeros(weight.shape[0], rank, device=weight.device)
    return found


def linear_layers(denoiser: nn.Module) -> dict[str, Any]:
    """{path: layer} of the linear layers; of one with an adapter, the layer that has the adapter."""
    found: dict[str, Any] = {}
    for name, module in denoiser.named_modules():
        inner = getattr(module, "base_layer", module)
        if isinstance(inner, nn.Linear) and ".lora_" not in name and not name.endswith(".base_layer"):
            found[name] = module
    return found


@contextmanager
def adapted(backbone: Backbone, adapters: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside this context the layers of `new_adapters` give B A x in addition."""
    layers = linear_layers(backbone.denoiser)

    def adding(down: Tensor, up: Tensor) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + (inputs[0].to(down.dtype) @ down.T @ up.T).to(output)

        return add

    device = next(backbone.denoiser.parameters()).device
    hooks = []
    for key in adapters:
        name, _, part = key.rpartition(".")
        if part == "down":
            down, up = (adapters[f"{name}.{one}"].to(device) for one in ("down", "up"))
            hooks.append(layers[name].register_forward_hook(adding(down, up)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
