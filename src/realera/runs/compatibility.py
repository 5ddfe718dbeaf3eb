"""Checks that a method's settings fit the base model, from the headers of its files and before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from realera.backbones import fitting, folder, kinds
from realera.backbones.kinds import Kind
from realera.contracts import UserError
from realera.files import headers
from realera.runs import suitability
from realera.settings.run_settings import BackboneSettings, Settings
from realera.settings.source_code import fact


def check(model: Path | None, config: Mapping[str, Any]) -> None:
    """Checks the settings against a model. model: a checkpoint's folder; None if it is not on this machine: then only
    the samplers are checked, against the kind of model that the backbone's settings tell.

    Raises:
        UserError: the trained network lacks a LoRA's target or a parameter, or the image size or sampler is not
        possible.
    """
    settings = Settings(config)
    backbone, align = settings.backbone, settings.method.align
    if (kind := suitability.kind_of(backbone, model)) is None:
        return
    if model is not None:
        _check_kind(model, kind, backbone)
    flow = kind != kinds.UNET
    multiple = 1 if model is None else _pixels(model, flow)
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
    if model is None or not align.steps:
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


def _check_kind(model: Path, kind: Kind, backbone: BackboneSettings) -> None:
    """Raises UserError for a model of another kind than the backbone's, as its loading would."""
    if (joint := suitability.has_joint_attention(backbone)) is None:
        return
    fitting.refuse_other_denoiser(model, kind, transformer=joint)
    if joint:
        fitting.refuse_other_kind(kind, backbone.like)
        forms = [kinds.form(kind, part) for part in kinds.encoders(kind, model)]
        fitting.refuse_t5(kind, backbone.t5, there=kinds.T5 in forms)
    reads = headers.read_json(folder.settings_file(model, kinds.denoiser(model)))
    width = reads.get("joint_attention_dim" if joint else "cross_attention_dim")
    if isinstance(width, int):
        fitting.refuse_other_text(backbone.text.node, {"width": width})


def _pixels(model: Path, flow: bool) -> int:
    """The number that the sides of an image are multiples of."""
    levels = headers.read_json(folder.settings_file(model, "vae")).get("block_out_channels") or [0] * 4
    return int(2 ** (len(levels) - 1) * (kinds.patch(model) if flow else 1))


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
    return ((at, part) for at, part in suitability.parts(node) if str(part["_target_"]).endswith(".Sampler"))
