"""Draws the same images with a run's own weights and with those read back from an exported file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from realera.backbones import folder, kinds, original_layout, portable
from realera.contracts import Prompt
from realera.runs import steps
from realera.runs.folders import Run
from realera.settings import composition

log = logging.getLogger(__name__)
USUAL = 4  # images, if the number is not given
QUICK = 128  # pixels: an image up to this side takes seconds on a CPU
FAR = 2.0  # grey levels: more than half precision changes


def distance(
    run: Run, source: Path, state: Mapping[str, Tensor], to: str, path: Path, images: int | None, name: str
) -> float | None:
    """Mean absolute difference in grey levels (0 to 255) between images of the run and of the file, the same prompts
    and seeds; only the denoiser and the text encoders differ. The prompts are the task's own, half of them with the
    concept. None if no images are asked for.

    source: the base model's folder. state: of the run's erased.safetensors. images: None = `USUAL` on a GPU or for
    small images, else 0.
    """
    sampler = run.settings.backbone.sampler
    if images is None:
        quick = torch.cuda.is_available() or max(sampler.height, sampler.width) <= QUICK
        images = USUAL if quick else 0
        if not quick:
            log.info("not verified by drawing, which would take minutes on this CPU: verify=%d draws", USUAL)
    if not images:
        return None
    config = {**run.config, "backbone": {**run.settings.backbone.node, "pretrained": str(source)}}
    backbone = steps.load_backbone(config)
    prompts = _prompts(run, images)
    texts, seeds = [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]
    drawn = []
    for weights in (dict(state), exported_weights(source, to, path)):
        backbone.load_erased(weights)
        drawn.append(torch.cat([backbone.generate([text], [seed]).cpu().float() for text, seed in zip(texts, seeds)]))
    apart = float((drawn[0] - drawn[1]).abs().mean())
    (log.warning if apart > FAR else log.info)(
        "%d images of %s differ from the run's own by %.2f grey levels on average", images, name, apart
    )
    return apart


def exported_weights(source: Path, to: str, path: Path) -> dict[str, Tensor]:
    """{"edit.<name>": weight} of denoiser and text encoders as a reader of the file gets them, float32, for
    `Backbone.load_erased`."""
    part = kinds.denoiser(source)
    texts: dict[str, Tensor] = {}
    if to in ("diffusers", "checkpoint"):
        texts = _text_weights(source, to, path)
    if to == "diffusers":
        base, found = portable.base_denoiser(source), portable.part_state(path, part)
    elif to == "checkpoint":
        base = portable.base_denoiser(source)
        prefixes = original_layout.unet_names(base)
        with safe_open(path, "pt") as reader:
            found = {name: reader.get_tensor(there) for name, there in prefixes.items()}
    else:
        names = portable.lora_names(folder.weights(source, part), to, portable.kind_of(source))
        changes = portable.read_lora(path, to, names)
        base = portable.base_denoiser(source, changes)
        found = {name: (base[name].double() + change).float() for name, change in changes.items()}
    changed = {name: value.float() for name, value in found.items() if not torch.equal(value, base[name])}
    return {f"{portable.EDIT}{name}": value for name, value in {**changed, **texts}.items()}


def _text_weights(source: Path, to: str, path: Path) -> dict[str, Tensor]:
    """{"<folder>.<name>": weight} of the text encoders' changed weights, float32."""
    parts = [part for part in folder.models(source) if part.startswith(portable.TEXT)]
    bases = {part: portable.part_state(source, part) for part in parts}
    if to == "diffusers":
        found = {part: portable.part_state(path, part) for part in parts}
    else:
        with safe_open(path, "pt") as reader:
            stored = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
        kind = portable.kind_of(source)
        assert kind is not None, "a transformer has no such layout"
        found = original_layout.text_parts(stored, kind, bases)
    return {
        f"{part}.{name.removeprefix('text_model.')}": found[part][name].float()
        for part, base in bases.items()
        for name, value in base.items()
        if value.is_floating_point() and not torch.equal(found[part][name].to(value.dtype), value)
    }


def _prompts(run: Run, images: int) -> list[Prompt]:
    """The first prompts of the splits erase and keep, in turn."""
    prompts = composition.build_task(run.config).eval_prompts()
    erase = [prompt for prompt in prompts if prompt.split == "erase"]
    keep = [prompt for prompt in prompts if prompt.split != "erase"]
    turns = [prompt for pair in zip(erase, keep) for prompt in pair]
    return [*turns, *(prompt for prompt in prompts if prompt not in turns)][:images]
