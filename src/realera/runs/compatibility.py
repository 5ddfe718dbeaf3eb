"""Checks that a method's settings fit the base model, from the headers of its files and before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from realera.backbones import folder, kinds
from realera.contracts import UserError
from realera.files import headers
from realera.settings.run_settings import BackboneSettings, Settings
from realera.settings.source_code import fact


def check(model: Path, config: Mapping[str, Any]) -> None:
    """Checks the settings against a model. model: a checkpoint's folder.

    Raises:
        UserError: the trained network lacks a LoRA's target or a parameter, or the image size or sampler is not
        possible; the method learns token vectors, and the model's text encoders have no common ones.
    """
    settings = Settings(config)
    backbone, align = settings.backbone, settings.method.align
    flow = kinds.of(model) != kinds.UNET
    levels = headers.read_json(folder.settings_file(model, "vae")).get("block_out_channels") or [0] * 4
    multiple = 2 ** (len(levels) - 1) * (kinds.patch(model) if flow else 1)
    for at, sampler in _samplers({"backbone": backbone.node, "method": settings.method.node}):
        for side in ("height", "width"):
            if sampler.get(side, multiple) % multiple:
                raise UserError(
                    f"{at}.{side}={sampler[side]} cannot be drawn: choose a multiple of {multiple} pixels for backbone "
                    f"{backbone.name}."
                )
        if (sampler.get("scheduler", "ddim") == "euler") != flow:
            raise UserError(
                f"{at}.scheduler={sampler.get('scheduler', 'ddim')} is not possible with backbone {backbone.name}: "
                f"choose {'euler' if flow else 'ddim or dpm++'}."
            )
    parts = settings.method.node
    used = parts if align.steps else {part: parts.get(part) for part in ("edit", "finish")}
    if kinds.of(model) in (kinds.SD3, kinds.FLUX) and any(map(_learns_vectors, _parts(used))):
        raise UserError(
            f"method {settings.method.name} puts learned vectors in place of a name's tokens, and the text encoders of "
            f"backbone {backbone.name} split a name into different numbers of tokens: choose a method such as realera, "
            "esd-x or uce."
        )
    if not align.steps:
        return
    axes = _trained_weights(model, str(fact(str(align.target), "network", "denoiser")))
    if align.lora:
        layers = [name.removesuffix(".weight") for name in axes if axes[name] > 1 and name.endswith(".weight")]
        endings = (re.search(r"attn\d?\.(to|add)_\w+(\.\d+)?$", layer) for layer in layers)
        known = sorted({ending.group() for ending in endings if ending})
        for number, target in enumerate(align.lora_targets):
            if not any(fnmatchcase(f".{layer}", f"*.{target}") for layer in layers):
                raise UserError(_no_such(f"method.align.lora.targets[{number}]", target, "layer", backbone, known))
    else:
        for number, target in enumerate(align.parameters):
            part = str(target).removeprefix("-")
            if part != "all" and not any(fnmatchcase(f".{name}.", f"*.{part}.*") for name in axes):
                known = list(dict.fromkeys(name.split(".")[name.startswith("text_encoder")] for name in axes))
                raise UserError(_no_such(f"method.align.parameters[{number}]", target, "weight", backbone, known))


def _trained_weights(model: Path, network: str) -> Mapping[str, int]:
    """{name of a weight: number of its axes} of the network that is trained, named as `Backbone.trained` names it."""
    if network == "denoiser":
        return folder.weights(model, kinds.denoiser(model))
    texts = [part for part in folder.models(model) if part.startswith("text_encoder")]
    return {
        f"{part}.{name.removeprefix('text_model.')}": axes
        for part in texts
        for name, axes in folder.weights(model, part).items()
    }


def _no_such(at: str, target: Any, kind: str, backbone: BackboneSettings, known: Sequence[str]) -> str:
    return f"{at}={target} is not a {kind} of backbone {backbone.name}: it has {', '.join(known)}."


def _samplers(node: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted name, settings) of every Sampler in the settings."""
    return ((at, part) for at, part in _parts(node) if str(part["_target_"]).endswith(".Sampler"))


def _learns_vectors(part: tuple[str, Mapping[str, Any]]) -> bool:
    """Whether a part learns token vectors, according to the facts that its class states (`contracts.Method`)."""
    _, settings = part
    target = str(settings["_target_"])
    idle = fact(target, "idle_where", {})
    return bool(fact(target, "learns_vectors")) and not any(settings.get(key) == idle[key] for key in idle)


def _parts(node: Any, at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted name, settings) of everything in the settings that is built from a class, at any depth."""
    for key, value in node.items() if isinstance(node, Mapping) else ():
        here = f"{at}.{key}" if at else str(key)
        if isinstance(value, Mapping) and value.get("_target_"):
            yield here, value
        yield from _parts(value, here)
