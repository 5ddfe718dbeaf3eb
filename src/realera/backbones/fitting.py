"""Refuses a checkpoint that a backbone's settings do not fit. Both the loading and the checks before it use this
module, which does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realera.backbones import kinds
from realera.backbones.kinds import Kind
from realera.contracts import UserError


def refuse_other_denoiser(place: Path, kind: Kind, transformer: bool) -> None:
    """Raises UserError for a U-Net's checkpoint given to a transformer's backbone (transformer: true) or the other way
    round."""
    if transformer == (kind != kinds.UNET):
        return
    known = "backbone=sd14 or backbone=sdxl" if transformer else "backbone=sd35-medium or backbone=flux-dev"
    said = "a U-Net's" if transformer else "a diffusion transformer's"
    raise UserError(f"The checkpoint {str(place)!r} is {said}: choose a backbone of its kind, such as {known}.")


def refuse_other_kind(kind: Kind, like: Sequence[str]) -> None:
    """Raises UserError for a transformer's checkpoint whose kind is not among `backbone.like`."""
    own = kinds.FLUX if kind == kinds.FLUX else kinds.SD3
    if own not in like:
        raise UserError(
            f"The checkpoint is of the kind {own} and backbone.like=[{','.join(like)}] names defaults of others: "
            f"choose backbone={'flux-dev' if own == kinds.FLUX else 'sd35-medium'} with backbone.pretrained=DIR."
        )


def refuse_other_text(promised: Mapping[str, Any], found: Mapping[str, int]) -> None:
    """Raises UserError for figures of `backbone.text` that differ from the checkpoint's. found: {"width": D,
    "max_length": T}; either may be missing."""
    for key, own in found.items():
        if (wanted := promised.get(key, own)) != own:
            raise UserError(
                f"backbone.text.{key} is {wanted} but the checkpoint has {own}; set backbone.text.{key}={own} or "
                "choose the backbone that this checkpoint belongs to."
            )


def refuse_t5(kind: Kind | None, t5: Any, there: bool) -> None:
    """Raises UserError if the setting `backbone.t5` is not possible. there: the checkpoint has a T5."""
    if kind == kinds.FLUX and t5 is False:
        raise UserError(
            "backbone.t5=false is not possible with FLUX, which reads its text through T5 alone: set backbone.t5=int8 "
            "for half of bfloat16's memory."
        )
    if not there and t5 not in (None, False):
        raise UserError(f"backbone.t5={t5} has no effect, because this checkpoint has no T5: set backbone.t5=false.")
